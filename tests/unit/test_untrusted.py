"""What others wrote or can reach: tables of contents, staging folders, the sockets of the weight link.

Not covered: whole checkpoints (tests/distributed/test_checkpoint_refusals.py), NCCL's own sockets.
"""

import os
import pickle
import socket
import threading
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.convert.staging import StagingFolder
from megatron_mcpo.rollout.weight_link import _UNWATCHED, Receiver, Sender, _unwatched
from megatron_mcpo.weights.safe_unpickler import read_metadata

M = b"torch.distributed.checkpoint.metadata"
PLANNER = b"torch.distributed.checkpoint.planner"

# What each changes in this process, and the pickle: protocol 0, in which BUILD is b.
CHANGES = {
    "a method of a class": b"c" + M + b"\nMetadata\n(N}S'__init__'\nc" + M + b"\nMetadataIndex\nstb.",
    "attributes of a class": b"c" + M + b"\nMetadata\n}S'x'\nI1\nsb.",
    "a member of an enumeration": b"c" + PLANNER + b"\nWriteItemType\n(I1\ntR}S'_value_'\nI7\nsb.",
    "another member": b"c" + M + b"\n_MEM_FORMAT_ENCODING\n(I0\ntR}S'_name_'\nS'x'\nsb.",
    "a function": b"ctorch.serialization\n_get_layout\n(N}S'__defaults__'\n(I1\ntstb.",
    "nothing before it": b"}b.",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_table_that_would_change_this_program_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    before = (dcp.Metadata.__init__, dict(vars(dcp.Metadata)), torch.serialization._get_layout.__defaults__)
    (tmp_path / ".metadata").write_bytes(CHANGES[name])
    with pytest.raises(ValueError, match=r"sets attributes of a|no table of contents"):
        read_metadata(tmp_path)
    assert before == (dcp.Metadata.__init__, dict(vars(dcp.Metadata)), torch.serialization._get_layout.__defaults__)
    assert [item.value for item in WriteItemType] == [1, 2, 3]
    assert dcp._MEM_FORMAT_ENCODING(0).name == "TORCH_CONTIGUOUS_FORMAT"


def test_a_table_of_contents_is_read_as_it_was_written(tmp_path: Path) -> None:
    chunk = dcp.ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([2]))
    properties = dcp.TensorProperties(dtype=torch.bfloat16)
    tensor = dcp.TensorStorageMetadata(properties=properties, size=torch.Size([2]), chunks=[chunk])
    written = dcp.Metadata(
        state_dict_metadata={"w": tensor, "object": dcp.BytesStorageMetadata()},
        storage_data={dcp.MetadataIndex("w", [0]): "a"},
        storage_meta=dcp.StorageMeta(),
    )
    (tmp_path / ".metadata").write_bytes(pickle.dumps(written))
    assert read_metadata(tmp_path) == written


def test_the_weight_link_listens_on_one_address() -> None:
    """Of a sender and its receiver: also gloo's own sockets."""
    listening = set(_listening())
    sender = Sender(("127.0.0.1", 9), "t")
    joined = threading.Thread(target=sender.join, args=(1, torch.device("cpu")))
    joined.start()
    receiver = Receiver(sender.meeting, worker=0, num_workers=1, device=torch.device("cpu"))
    joined.join()
    opened = set(_listening()) - listening
    assert opened and {address for address, _ in opened} == {"127.0.0.1"}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", sender.meeting.port), 5)
    del receiver, sender


def test_torch_settings_for_a_link_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other group of the process is watched as the user or torch wants it."""
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="no group"), _unwatched():
        assert [os.environ[name] for name in _UNWATCHED] == ["1", "0"]
        raise RuntimeError("no group")
    assert dict(os.environ) == before


def _listening() -> list[tuple[str, int]]:
    found = psutil.Process().net_connections(kind="inet")
    return [(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN]


@pytest.mark.parametrize("link", [".new.partial", ".new.partial/parts", ".new.partial/job.json"])
def test_a_staging_folder_that_is_a_link_is_refused(tmp_path: Path, link: str) -> None:
    """What lies behind it would be deleted or overwritten."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("x")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(other / "kept" if link.endswith("json") else other)
    with pytest.raises(ConfigError, match="must not be a link"):
        StagingFolder.begin(tmp_path / "new", {"from": "a"})
    assert (other / "kept").read_text() == "x"


def test_links_inside_a_staging_folder_are_removed_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("x")
    StagingFolder.begin(tmp_path / "new", {"from": "a"}).close()
    (tmp_path / ".new.partial" / "link").symlink_to(other)
    StagingFolder.begin(tmp_path / "new", {"from": "b"}).close()
    assert (other / "kept").read_text() == "x" and not (tmp_path / ".new.partial" / "link").exists()
