"""`_CHECKPOINT_METADATA`, with Orbax on the other side."""

from __future__ import annotations

import json
import math

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint._src.metadata.step_metadata_serialization import get_step_metadata

from ckptkit import errors
from ckptkit.metadata.step import STEP_FILE, StepMetadata, decode_step, encode_step

texts = st.text(max_size=5)
custom = st.dictionaries(texts, st.none() | st.integers() | st.lists(texts), max_size=3)
metadata = st.builds(
    StepMetadata,
    item_handlers=st.none() | texts | st.dictionaries(texts, texts),
    metrics=custom,
    performance_metrics=st.dictionaries(texts, st.floats(allow_nan=False)),
    init_timestamp_nsecs=st.none() | st.integers(0, 2**63),
    commit_timestamp_nsecs=st.none() | st.integers(0, 2**63),
    custom_metadata=custom,
)


@given(metadata)
def test_a_round_trip(meta):
    assert decode_step(encode_step(meta), STEP_FILE) == meta


def test_reads_what_orbax_writes(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": np.ones(2)}, custom_metadata={"n": 2**70, "x": math.inf})
    meta = decode_step((tmp_path / "c" / STEP_FILE).read_bytes(), STEP_FILE)
    assert meta.item_handlers == "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    assert meta.custom_metadata == {"n": 2**70, "x": math.inf}
    assert meta.init_timestamp_nsecs < meta.commit_timestamp_nsecs


def test_writes_the_fields_that_orbax_writes(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": np.ones(2)})
    data = (tmp_path / "c" / STEP_FILE).read_bytes()
    assert json.loads(encode_step(decode_step(data, STEP_FILE))) == json.loads(data)


def test_orbax_reads_what_is_written(tmp_path):
    meta = StepMetadata(
        item_handlers={"state": "a.B"},
        metrics={"loss": 0.5},
        performance_metrics={"checkpointer_blocking_duration_secs": 1.5},
        init_timestamp_nsecs=1,
        commit_timestamp_nsecs=2,
        custom_metadata={"n": 2**70, "text": "größe"},
    )
    (tmp_path / STEP_FILE).write_bytes(encode_step(meta))
    read = get_step_metadata(tmp_path)
    assert (read.item_handlers, read.metrics, read.custom_metadata) == (meta.item_handlers, meta.metrics, meta.custom_metadata)
    assert (read.init_timestamp_nsecs, read.commit_timestamp_nsecs) == (1, 2)
    assert read.performance_metrics.checkpointer_blocking_duration_secs == 1.5


def test_every_field_may_be_absent_or_null():
    assert decode_step(b"{}", STEP_FILE) == StepMetadata()
    nulls = dict.fromkeys(json.loads(encode_step(StepMetadata())))
    assert decode_step(json.dumps(nulls).encode(), STEP_FILE) == StepMetadata()


def test_unknown_fields_count_as_custom_metadata():
    data = b'{"new": 1, "shared": 1, "custom_metadata": {"shared": 2}}'
    assert decode_step(data, STEP_FILE).custom_metadata == {"new": 1, "shared": 2}


def test_an_item_without_a_handler_is_left_out():
    assert decode_step(b'{"item_handlers": {"a": "x.Y", "b": null}}', STEP_FILE).item_handlers == {"a": "x.Y"}


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"null",
        b'{"item_handlers": 1}',
        b'{"item_handlers": {"a": ["x"]}}',
        b'{"metrics": []}',
        b'{"performance_metrics": 3}',
        b'{"init_timestamp_nsecs": "1"}',
        b'{"init_timestamp_nsecs": 1.5}',
        b'{"commit_timestamp_nsecs": true}',
        b'{"custom_metadata": [1]}',
    ],
)
def test_a_field_of_the_wrong_type_is_a_format_error(data):
    with pytest.raises(errors.FormatError, match=r"_CHECKPOINT_METADATA: .* expected"):
        decode_step(data, STEP_FILE)


def test_custom_metadata_that_is_no_dict_is_refused():
    with pytest.raises(errors.ArgsTypeError, match="custom_metadata is a list"):
        encode_step(StepMetadata(custom_metadata=[1]))  # type: ignore[arg-type]
