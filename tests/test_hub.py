"""Adapters on the hub, played with a stand-in of it on the loopback interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hub_user
import inlay
from hub_stand_in import HubStandIn, process_that_uses
from tiny_models import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    stand_in = HubStandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture(scope="module")
def online(hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    with process_that_uses(hub, tmp_path_factory.mktemp("home")) as run:
        run(hub_user.base_model)
        yield run


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return hub_user.saved(tmp_path / "adapter")


def test_downloads_once_and_then_uses_its_copy(
    hub: HubStandIn, online: Callable[..., Any], files: dict[str, bytes]
) -> None:
    hub.publish("user/once", files)
    hub.downloads()
    assert online(hub_user.load, "user/once") == hub_user.output(hub_user.adapter())
    assert hub.downloads() == [f"/user/once/resolve/main/{name}" for name in (CONFIG, WEIGHTS)]
    assert online(hub_user.load_second, "user/once") == hub_user.output(hub_user.adapter())
    assert hub.downloads() == []
    assert online(hub_user.load, "user/once", force_download=True) == hub_user.output(hub_user.adapter())
    assert len(hub.downloads()) == 2


def test_revision_and_subfolder_say_which_files(
    hub: HubStandIn, online: Callable[..., Any], tmp_path: Path
) -> None:
    versions = [hub_user.saved(tmp_path / str(seed), seed=seed, lora_alpha=seed) for seed in (1, 2, 3)]
    first = hub.publish("user/versions", versions[0])
    hub.publish("user/versions", versions[1])
    hub.publish("user/versions", {f"inner/one/{name}": b for name, b in versions[2].items()}, branch="dev")
    places = [{"revision": first}, {}, {"revision": "dev", "subfolder": "inner/one"}]
    for seed, place in zip((1, 2, 3), places, strict=True):
        expected = hub_user.output(hub_user.adapter(seed, lora_alpha=seed))
        assert online(hub_user.load, "user/versions", **place) == expected
        assert online(hub_user.load_second, "user/versions", **place) == expected
        assert online(hub_user.load_config, "user/versions", **place)["lora_alpha"] == seed


def test_a_pickle_of_tensors_is_found_too(
    hub: HubStandIn, online: Callable[..., Any], tmp_path: Path
) -> None:
    hub_user.adapter().save_pretrained(tmp_path, safe_serialization=False)
    hub.publish("user/pickle", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert online(hub_user.load, "user/pickle") == hub_user.output(hub_user.adapter())


def test_without_network_the_cache_is_enough(
    hub: HubStandIn, online: Callable[..., Any], files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish("user/cached", files)
    expected = hub_user.output(hub_user.adapter())
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert online(hub_user.load, "user/cached", **cache) == expected
    hub.downloads()
    assert online(hub_user.load, "user/cached", local_files_only=True, **cache) == expected
    assert hub.requests == []
    with hub.down():
        assert online(hub_user.load, "user/cached", **cache) == expected
    assert hub_user.load("user/cached", **cache) == expected, "in this process HF_HUB_OFFLINE is set"


@pytest.mark.parametrize(
    ("repository", "place", "reason"),
    [
        ("user/missing", {}, "no such repository on the hub"),
        ("user/no_adapter", {}, "the repository has no such file"),
        ("user/no_weights", {}, "the repository has no such file"),
        ("user/whole", {"revision": "absent"}, "the repository has no revision 'absent'"),
        ("user/whole", {"subfolder": "absent"}, "the repository has no such file in 'absent'"),
        ("user/new", {"local_files_only": True}, "no such folder or cached file"),
        ("one/too/many", {}, ""),
        ("not a name", {}, ""),
    ],
)
def test_what_is_not_there_is_told_and_nothing_is_changed(
    hub: HubStandIn,
    online: Callable[..., Any],
    files: dict[str, bytes],
    repository: str,
    place: dict[str, Any],
    reason: str,
) -> None:
    hub.publish("user/no_adapter", {"README.md": b"nothing else"})
    hub.publish("user/no_weights", {CONFIG: files[CONFIG]})
    hub.publish("user/whole", files)
    hub.publish("user/new", files)
    message, unchanged = online(hub_user.fail_to_load, repository, **place)
    missing = WEIGHTS if repository == "user/no_weights" else CONFIG
    assert message.startswith(f"Can't find '{missing}' at '{repository}'")
    assert reason in message
    assert "\n" not in message
    assert unchanged


def test_a_hub_that_fails_is_told_and_nothing_is_changed(
    hub: HubStandIn, online: Callable[..., Any], files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("user/unlucky", files)
    with hub.down():
        message, unchanged = online(hub_user.fail_to_load, "user/unlucky")
    assert message.endswith("the hub was not asked (offline) or did not answer")
    assert unchanged
    monkeypatch.setattr(hub, "cut_off", 20)
    message, unchanged = online(hub_user.fail_to_load, "user/unlucky")
    assert message.startswith(f"Can't find '{CONFIG}' at 'user/unlucky': ")
    assert "\n" not in message
    assert unchanged
    monkeypatch.setattr(hub, "cut_off", None)
    assert online(hub_user.load, "user/unlucky") == hub_user.output(hub_user.adapter())


def test_a_setup_is_found_with_its_adapters(
    hub: HubStandIn, online: Callable[..., Any], tmp_path: Path
) -> None:
    versions = {name: hub_user.saved(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    children = [{"type": "single", "children": [name]} for name in versions]
    setup = {"adapter_setup": {"type": "Parallel", "children": children}}
    files = {
        f"inner/{name}/{file}": content for name, saved in versions.items() for file, content in saved.items()
    }
    hub.publish("user/setup", files | {"inner/adapter_setup.json": json.dumps(setup).encode()})
    got = online(hub_user.load, "user/setup", subfolder="inner")
    wanted = [row for seed in (1, 2) for row in hub_user.output(hub_user.adapter(seed))]
    assert torch.allclose(torch.tensor(got), torch.tensor(wanted), atol=1e-6)


def test_a_folder_comes_before_a_repository_of_its_name(
    hub: HubStandIn, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.downloads()
    assert hub_user.load("adapter") == hub_user.output(hub_user.adapter())
    (tmp_path / "adapter" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_model.safetensors' at 'adapter'$"):
        hub_user.load("adapter")
    assert hub.requests == []


def test_saving_asks_nobody(
    hub: HubStandIn, online: Callable[..., Any], files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish("user/base", {"config.json": b'{"vocab_size": 7}'})
    hub.downloads()
    online(hub_user.save_without_network, str(tmp_path / "quiet"))
    assert hub.requests == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "quiet").iterdir()} == files


def test_pushing_commits_exactly_what_is_saved(
    hub: HubStandIn, online: Callable[..., Any], files: dict[str, bytes]
) -> None:
    address, oid = online(hub_user.push, "user/pushed", commit_message="first")
    assert address == f"{hub.url}/user/pushed/commit/{oid}"
    assert hub.repositories["user/pushed"].files(oid) == files
    assert online(hub_user.load, "user/pushed", revision=oid) == hub_user.output(hub_user.adapter())
    head = files["README.md"].decode().split("---")[1]
    assert "base_model: user/base\nlibrary_name: peft\n" in head


def test_pushing_to_a_branch_leaves_main_alone(
    hub: HubStandIn, online: Callable[..., Any], files: dict[str, bytes]
) -> None:
    online(hub_user.push, "user/branches", safe_serialization=False)
    online(hub_user.push, "user/branches", revision="dev")
    branches = hub.repositories["user/branches"]
    assert branches.files("dev").items() >= files.items()
    assert set(branches.files("main")) == {"README.md", CONFIG, "adapter_model.bin"}
    assert online(hub_user.load, "user/branches", revision="dev") == hub_user.output(hub_user.adapter())


def test_a_base_model_in_a_folder_can_be_pushed(
    hub: HubStandIn, online: Callable[..., Any], tmp_path: Path
) -> None:
    online(
        hub_user.push, "user/local", base=str(tmp_path)
    )  # the hub refuses cards whose base_model is a path
    pushed = hub.repositories["user/local"].files("main")
    assert json.loads(pushed[CONFIG])["base_model_name_or_path"] == str(tmp_path)
    assert b"base_model:" not in pushed["README.md"].split(b"---")[1]


def test_auto_class_finds_base_and_adapter(
    hub: HubStandIn, online: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    old = hub.publish("user/llama", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    hub.publish("user/llama", {"config.json": b"{}"})  # unusable: the recorded revision has to be asked for
    base.config._name_or_path = "user/llama"
    config = inlay.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = inlay.get_peft_model(base, config, revision=old).eval()
    model.save_pretrained(tmp_path / "adapter")
    inner = {f"inner/{path.name}": path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    hub.publish("user/auto", inner, branch="dev")
    name, logits = online(hub_user.load_auto, "user/auto", revision="dev", subfolder="inner")
    assert name == "PeftModelForCausalLM"
    with torch.no_grad():
        assert logits == model(torch.arange(5)[None]).logits.flatten().tolist()
