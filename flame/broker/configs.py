"""What the server is told of streams and buckets, and tells of consumers, in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame.broker.bucket import bucket_stream
from flame.broker.seam import ConsumerState
from flame.broker.wire import SECOND_NS
from flame.protocol.topology import BucketSpec, Retention, StreamSpec


def consumer_state(info: Mapping[str, Any]) -> ConsumerState:
    """Read what the server says of a consumer."""
    return ConsumerState(str(info["name"]), int(info["num_pending"]), int(info["num_ack_pending"]))


def stream_config(spec: StreamSpec) -> dict[str, Any]:
    """Return the configuration of a stream."""
    config: dict[str, Any] = {
        "name": spec.name,
        "subjects": list(spec.subjects),
        "retention": "workqueue" if spec.retention is Retention.WORK else "limits",
        "storage": "file",
        "discard": "new" if spec.refuse_when_full else "old",
        "discard_new_per_subject": spec.one_per_subject and spec.refuse_when_full,
        "max_msgs_per_subject": 1 if spec.one_per_subject else -1,
        "max_msgs": spec.max_messages,
        "max_bytes": spec.max_bytes,
        "max_age": int(spec.max_age_s * SECOND_NS),
        "max_consumers": 1_000_000 if spec.retention is Retention.WORK else -1,
        "allow_direct": spec.direct,
        "duplicate_window": SECOND_NS,
        "num_replicas": spec.replicas,
    }
    if spec.message_ttl:
        config["allow_msg_ttl"] = True
    if spec.republish is not None:
        config["republish"] = {"src": spec.republish[0], "dest": spec.republish[1]}
    return config


def bucket_config(spec: BucketSpec) -> dict[str, Any]:
    """Return the configuration of the stream under a bucket."""
    return {
        "name": bucket_stream(spec.name),
        "subjects": [f"$KV.{spec.name}.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "max_msg_size": spec.max_value_bytes,
        "max_age": int(spec.ttl_s * SECOND_NS),
        "max_consumers": -1,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
        "deny_delete": True,
        "allow_direct": False,
        "duplicate_window": int(min(spec.ttl_s or 120, 120) * SECOND_NS),
        "num_replicas": spec.replicas,
    }
