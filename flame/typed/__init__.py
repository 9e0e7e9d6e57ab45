"""What typed services and typed sessions have in common: Python types, their JSON, and its schemas.

The service's side is in `flame.service.typed`, the client's in `flame.client.typed`. An executor of a service that is
not typed loads nothing of this, and so no pydantic.
"""
