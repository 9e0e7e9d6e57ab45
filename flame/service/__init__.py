"""The service side of the SDK: what runs in an executor."""
