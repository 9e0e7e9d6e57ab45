"""What the broker holds, and every default, as the design's table has them."""

from __future__ import annotations

import math

import pytest

from flame.broker.embedded.config import EmbeddedBrokerConfig
from flame.protocol import defaults, subjects, topology
from flame.protocol.records import ApplicationSpec, SessionOptions
from flame.protocol.resources import Resources
from flame.protocol.topology import Retention
from flame_services.scheduler.reap import backoff_s

KIB, MIB, GIB, HOUR_S = 1024, 1024**2, 1024**3, 3600.0


# ---- the table of defaults


def test_a_message_holds_256_kib_of_a_value_and_the_server_takes_8_mib() -> None:
    assert defaults.INLINE_LIMIT_BYTES == 256 * KIB
    assert defaults.MAX_PAYLOAD_BYTES == 8 * MIB
    field = EmbeddedBrokerConfig.__dataclass_fields__["max_payload_bytes"]
    assert field.default == 8 * MIB


def test_a_result_is_kept_for_a_day_and_so_is_a_log_up_to_256_mib() -> None:
    assert defaults.RESULT_AGE_S == 24 * HOUR_S
    assert defaults.LOG_AGE_S == 24 * HOUR_S
    assert defaults.LOG_BYTES == 256 * MIB


def test_a_million_tasks_or_8_gib_may_wait() -> None:
    assert defaults.WAITING_TASKS == 1_000_000
    assert defaults.WAITING_BYTES == 8 * GIB


def test_a_lease_lasts_15_s_and_is_extended_every_5_s_while_it_is_certain() -> None:
    assert defaults.ACK_WAIT_S == 15.0
    assert defaults.LEASE_EXTENSION_S == 5.0
    assert defaults.LEASE_CERTAIN == 0.8
    assert defaults.LEASE_EXTENSION_S < defaults.LEASE_CERTAIN * defaults.ACK_WAIT_S
    assert defaults.extension_s(defaults.ACK_WAIT_S) == defaults.LEASE_EXTENSION_S
    assert defaults.extension_s(3.0) == 1.0


def test_a_node_beats_every_second_is_unknown_after_5_s_and_given_up_after_15_s() -> None:
    assert defaults.NODE_HEARTBEAT_S == 1.0
    assert defaults.NODE_UNKNOWN_S == 5.0
    assert defaults.NODE_GIVEN_UP_S == 15.0


def test_a_leaders_lease_lasts_3_s_and_is_renewed_every_second() -> None:
    assert defaults.LEADER_LEASE_S == 3.0
    assert defaults.LEADER_RENEWAL_S == 1.0


def test_a_session_is_entered_5_times_at_most_after_waits_that_double_from_a_tenth_of_a_second_to_5_s() -> None:
    assert ApplicationSpec(command="x").session_retry_limit == defaults.SESSION_RETRY_LIMIT == 5
    longest = [backoff_s(failures, 1.0) for failures in range(9)]
    assert longest == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


@pytest.mark.parametrize("failures", [1, 2, 5, 17, 100, 10**6])
def test_a_wait_is_jittered_between_its_half_and_its_whole(failures: int) -> None:
    assert backoff_s(failures, 0.0) == pytest.approx(backoff_s(failures, 1.0) / 2)
    assert (
        0 < backoff_s(failures, 0.0) <= backoff_s(failures, 0.5) <= backoff_s(failures, 1.0) <= defaults.BACKOFF_MAX_S
    )


def test_a_task_is_given_up_with_its_third_executor() -> None:
    assert defaults.POISON_LIMIT == 3


def test_a_service_has_60_s_to_become_ready_and_10_s_to_leave() -> None:
    assert defaults.READY_TIMEOUT_S == 60.0
    assert defaults.LEAVE_TIMEOUT_S == 10.0


def test_an_executor_is_released_after_60_s_and_a_session_has_0_to_8_of_them_with_one_task_each() -> None:
    spec = ApplicationSpec(command="x")
    assert (spec.delay_release_s, spec.min_instances, spec.max_instances, spec.concurrency) == (60.0, 0, 8, 1)
    options = SessionOptions()
    assert (options.min_instances, options.max_instances, options.priority) == (None, None, 0)


def test_an_executor_asks_for_a_tenth_of_a_processor_and_128_mib() -> None:
    assert SessionOptions().resources == defaults.RESOURCES == Resources.parse("cpu=0.1,mem=128m,gpu=0")
    assert str(defaults.RESOURCES) == "cpu=0.1,mem=128m,gpu=0"


def test_a_client_has_4096_publishes_under_way() -> None:
    assert defaults.PUBLISH_WINDOW == 4096


def test_the_server_decides_how_often_it_forces_data_to_disk() -> None:
    assert EmbeddedBrokerConfig.__dataclass_fields__["sync_interval"].default is None


def test_a_client_looks_after_5_s_and_at_least_once_a_minute() -> None:
    assert defaults.RECONCILE_FIRST_S == 5.0
    assert defaults.RECONCILE_MAX_S == 60.0


def test_a_task_without_a_listener_says_that_it_runs_after_a_tenth_of_a_second() -> None:
    assert defaults.RUNNING_NOTICE_S == 0.1


# ---- streams


def test_waiting_tasks_go_when_they_are_acknowledged_and_are_refused_when_there_are_too_many() -> None:
    stream = topology.task_stream("app")
    assert stream.name == "flame-task-app"
    assert stream.subjects == ("flame.task.app.*.*",)
    assert stream.retention is Retention.WORK
    assert stream.one_per_subject
    assert stream.refuse_when_full
    assert (stream.max_messages, stream.max_bytes, stream.max_age_s) == (1_000_000, 8 * GIB, 0.0)
    assert stream.republish is None


def test_a_result_is_the_only_one_of_its_task_and_only_its_age_ends_it() -> None:
    stream = topology.result_stream("app")
    assert stream.name == "flame-result-app"
    assert stream.subjects == ("flame.result.app.*.*",)
    assert stream.retention is Retention.LIMITS
    assert stream.one_per_subject
    assert stream.refuse_when_full
    assert (stream.max_messages, stream.max_bytes) == (topology.UNLIMITED, topology.UNLIMITED)
    assert stream.max_age_s == 24 * HOUR_S >= HOUR_S
    assert stream.direct


def test_a_stored_result_is_announced_as_the_end_of_its_task() -> None:
    announced = topology.result_stream("app").republish
    assert announced is not None
    source, destination = announced
    assert source == "flame.result.app.*.*"
    heard = destination.replace("{{wildcard(1)}}", "session").replace("{{wildcard(2)}}", "task")
    assert heard == subjects.event("app", "session", "task", "done")


def test_logs_are_limited_by_size_and_age_and_lose_what_is_old() -> None:
    stream = topology.log_stream("app")
    assert stream.subjects == ("flame.log.app.*.*",)
    assert (stream.max_bytes, stream.max_age_s) == (256 * MIB, 24 * HOUR_S)
    assert not stream.refuse_when_full
    assert not stream.one_per_subject


def test_chunks_are_kept_as_long_as_results_up_to_a_gib_and_lose_what_is_old() -> None:
    stream = topology.chunk_stream("app")
    assert stream.subjects == ("flame.chunk.app.*.*",)
    assert (stream.max_age_s, stream.max_bytes) == (topology.result_stream("app").max_age_s, 1024**3)
    assert not stream.refuse_when_full
    assert not stream.one_per_subject


def test_parts_of_large_values_are_dropped_by_nothing_but_a_time_of_their_own() -> None:
    stream = topology.blob_stream("app")
    assert stream.subjects == ("flame.blob.app.*.*.*.*",)
    assert (stream.max_messages, stream.max_bytes, stream.max_age_s) == (topology.UNLIMITED, topology.UNLIMITED, 0.0)
    assert stream.one_per_subject
    assert stream.refuse_when_full
    assert stream.direct
    assert stream.message_ttl
    assert defaults.VALUE_AGE_S > defaults.RESULT_AGE_S
    assert defaults.VALUE_LIMIT_BYTES == GIB
    assert 0 < defaults.VALUE_PART_BYTES < defaults.MAX_PAYLOAD_BYTES - 4096


def test_results_can_be_kept_before_a_task_can_be_asked_for() -> None:
    names = [stream.name for stream in topology.application_streams("app")]
    kinds = ["blob", "chunk", "log", "result", "task"]
    assert sorted(names) == [f"flame-{kind}-app" for kind in kinds]
    assert names[-1] == subjects.task_stream("app")


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_stream_and_bucket_has_as_many_copies_as_asked_for(replicas: int) -> None:
    assert {stream.replicas for stream in topology.application_streams("app", replicas)} == {replicas}
    assert {bucket.replicas for bucket in topology.buckets(replicas)} == {replicas}


def test_two_applications_share_nothing() -> None:
    one, other = topology.application_streams("a"), topology.application_streams("a-b")
    assert not {s.name for s in one} & {s.name for s in other}
    assert not {x for s in one for x in s.subjects} & {x for s in other for x in s.subjects}


# ---- consumers and buckets


def test_a_sessions_consumer_belongs_to_one_epoch_and_sees_only_its_session() -> None:
    spec = topology.session_consumer("app", "session", epoch=3, max_executors=100)
    assert (spec.stream, spec.name) == ("flame-task-app", "session-3")
    assert spec.filter_subject == "flame.task.app.session.*"
    assert spec.ack_wait_s == 15.0
    assert spec.max_waiting == 200
    assert spec.replicas == 0


def test_a_consumer_takes_twice_as_many_pulls_as_executors_and_never_very_few() -> None:
    for executors in (1, 2, 8, 9, 1000):
        spec = topology.session_consumer("app", "session", 1, executors)
        assert spec.max_waiting >= 2 * executors
        assert spec.max_waiting >= 16


def test_there_is_a_bucket_for_each_noun_and_only_leases_and_attempts_run_out() -> None:
    made = {bucket.name: bucket for bucket in topology.buckets()}
    nouns = {
        "applications",
        "sessions",
        "nodes",
        "executors",
        "bindings",
        "attempts",
        "leases",
        "common",
        "credentials",
        "state",
    }
    assert set(made) == {f"flame-{noun}" for noun in nouns}
    ends = {name: bucket.ttl_s for name, bucket in made.items() if bucket.ttl_s}
    assert ends == {"flame-leases": 3.0, "flame-attempts": 24 * HOUR_S}


def test_no_time_or_size_is_without_end() -> None:
    numbers = {name: value for name, value in vars(defaults).items() if isinstance(value, int | float)}
    assert len(numbers) > 30
    assert all(math.isfinite(value) and value >= 0 for value in numbers.values())
