"""Methods of a user's own: by the contract and by HF PEFT's hooks, from a package outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest

import peft_dist
from peft_dist.catalog import METHODS
from peft_dist.config import PeftConfig, TargetedConfig
from peft_dist.contract import WeightMethod
from peft_dist.errors import ConfigError, TakenError

ROOT = Path(__file__).parents[2]

# By the contract: dW = u v^T.
CONTRACT = '''
"""A method of someone else's."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft_dist.config import TargetedConfig
from peft_dist.contract import Param, WeightMethod


@dataclass
class OuterConfig(TargetedConfig, WeightMethod):
    """An outer product added to W: dW = size u v^T."""

    target_modules: list | str | None = None
    exclude_modules: list | str | None = None
    modules_to_save: list | None = None
    size: float = 1.0

    prefix: ClassVar[str] = "outer_"
    full_size: ClassVar[int] = 1

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "OUTER"

    def params(self, site):
        return {
            "u": Param("outer_u", ("out",), (site.out,), torch.nn.init.zeros_),
            "v": Param("outer_v", ("in",), (site.in_,), torch.nn.init.normal_),
        }

    def delta(self, p, base):
        return self.size * torch.outer(p["u"], p["v"])
'''

# By hooks, in the words of a program for HF PEFT: y + s(x) with a trained scale of the output.
HOOKS = """
from dataclasses import dataclass, field

import torch
from torch import nn
from peft_dist import PeftConfig, PeftType
from peft_dist.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft_dist.utils import register_peft_method


@dataclass
class GainConfig(PeftConfig):
    target_modules: list | str | None = None
    exclude_modules: list | str | None = None
    modules_to_save: list | None = None
    gain: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.GAIN


class GainLayer(BaseTunerLayer):
    adapter_layer_names = ("gain_scale",)
    other_param_names = ("start",)

    def __init__(self, base_layer):
        self.base_layer = base_layer
        self.gain_scale = nn.ParameterDict({})
        self.start = {}
        self.merged_adapters = []
        self._disable_adapters = False

    def update_layer(self, adapter_name, gain):
        self.gain_scale[adapter_name] = nn.Parameter(torch.full((self.get_base_layer().out_features,), gain))
        self.start[adapter_name] = gain
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)


class Linear(nn.Module, GainLayer):
    def __init__(self, base_layer, adapter_name, gain):
        super().__init__()
        GainLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, gain)

    def factor(self, names):
        factor = 1.0
        for name in names:
            if name in self.gain_scale:
                factor = factor + self.gain_scale[name]
        return factor

    def merge(self, safe_merge=False, adapter_names=None):
        names = [n for n in (adapter_names or self.active_adapters) if n not in self.merged_adapters]
        self.base_layer.weight.data *= self.factor(names)[:, None].detach()
        self.merged_adapters += names

    def unmerge(self):
        self.base_layer.weight.data /= self.factor(self.merged_adapters)[:, None].detach()
        self.merged_adapters = []

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        return y if self.merged else y * self.factor(self.active_adapters)


class GainModel(BaseTuner):
    prefix: str = "gain_"
    tuner_layer_cls = GainLayer
    target_module_mapping = {"llama": ["q_proj", "v_proj"]}

    def _create_and_replace(
        self, gain_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
    ):
        if isinstance(target, GainLayer):
            target.update_layer(adapter_name, gain_config.gain)
        else:
            new_module = Linear(target, adapter_name, gain_config.gain)
            self._replace_module(parent, target_name, new_module, target)


def register():
    register_peft_method(
        name="gain", config_cls=GainConfig, model_cls=GainModel, prefix="gain_", is_mixed_compatible=False
    )
"""

# What each of them is put through. `Config` and `NAME` come first.
PROGRAM = """
import json, sys, warnings
import torch
import peft_dist as peft
from peft_dist import PeftConfig, PeftModel, PeftType, get_peft_model
from peft_dist.errors import MergeError
from tests.contract import bases

assert PeftType(NAME) == NAME and json.dumps(PeftType[NAME]) == f'"{NAME}"' and NAME in PeftType.__members__
assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[NAME] is Config
assert peft.PEFT_TYPE_TO_PREFIX_MAPPING[NAME] == NAME.lower() + "_"
assert issubclass(peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType[NAME]], peft.BaseTuner)
ids = torch.arange(1, 8).view(1, 7)
config = Config(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
assert config.peft_type is PeftType[NAME]
bare = bases.llama()(ids).logits
model = get_peft_model(bases.llama(), config)
assert type(model) is peft.PeftModelForCausalLM
assert type(model.base_model) is peft.PEFT_TYPE_TO_TUNER_MAPPING[NAME]
torch.testing.assert_close(model(ids).logits, bare)
trained = [n for n, p in model.named_parameters() if p.requires_grad]
assert trained and all(NAME.lower() + "_" in n or "lm_head" in n for n in trained), trained
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
for _ in range(2):
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
changed = model(ids).logits
assert not torch.allclose(changed, bare, atol=1e-3)
with model.disable_adapter():
    torch.testing.assert_close(model(ids).logits, bare)
torch.testing.assert_close(model(ids).logits, changed)
model.save_pretrained(OUT)
assert json.load(open(OUT + "/adapter_config.json"))["peft_type"] == NAME
assert type(PeftConfig.from_pretrained(OUT)) is Config
again = PeftModel.from_pretrained(bases.llama(), OUT)
torch.testing.assert_close(again(ids).logits, changed)
lazily = PeftModel.from_pretrained(bases.llama(), OUT, low_cpu_mem_usage=True)
assert not any(p.is_meta for p in lazily.parameters())
torch.testing.assert_close(lazily(ids).logits, changed)
again.load_adapter(OUT, "second")
again.set_adapter("second")
torch.testing.assert_close(again(ids).logits, changed)
again.delete_adapter("second")
assert again.active_adapter == "default"
torch.testing.assert_close(again(ids).logits, changed)
if NAME == "GAIN":
    # Its layers merge by themselves: what they cannot be told is refused, and nothing is merged.
    try:
        again.merge_adapter(dequantize=True)
        raise AssertionError("the option was ignored")
    except MergeError as error:
        assert "dequantize" in str(error) and "q_proj" in str(error), error
    torch.testing.assert_close(again(ids).logits, changed)
again.merge_adapter()
torch.testing.assert_close(again(ids).logits, changed)
again.unmerge_adapter()
torch.testing.assert_close(again(ids).logits, changed)
merged = again.merge_and_unload()
torch.testing.assert_close(merged(ids).logits, changed, rtol=1e-4, atol=1e-5)
assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
named = get_peft_model(bases.llama(), Config(target_modules=["q_proj"])).merge_and_unload(adapter_names=["default"])
torch.testing.assert_close(named(ids).logits, bare)
alone = peft.PEFT_TYPE_TO_TUNER_MAPPING[NAME](bases.llama(), Config(target_modules=["q_proj"]), "default")
torch.testing.assert_close(alone(ids).logits, bare)
assert {k: v for k, v in [(n, p.requires_grad) for n, p in alone.named_parameters()] if v}
print("all is well")
"""


def package(folder: Path, name: str, text: str, entry_point: str | None = None) -> dict[str, str]:
    """An installed package of one file; the environment that finds it."""
    (folder / f"{name}.py").write_text(text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if entry_point:
        (info / "entry_points.txt").write_text(f"[peft_dist.methods]\n{entry_point}\n")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def run(code: str, environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


BY_CALL = {
    "contract": (
        CONTRACT,
        "from peft_dist import PeftType, register_peft_method\nPeftType.extend('OUTER')\n"
        "from own_method import OuterConfig as Config\n"
        "register_peft_method(name='outer', config_cls=Config, model_cls=None)\nNAME = 'OUTER'\n",
    ),
    "hooks": (
        HOOKS,
        "from peft_dist import PeftType\nPeftType.extend('GAIN')\nimport own_method\nown_method.register()\n"
        "Config, NAME = own_method.GainConfig, 'GAIN'\n",
    ),
}


@pytest.mark.slow  # 10 s: a process of its own that imports torch and transformers
@pytest.mark.parametrize("kind", BY_CALL)
def test_a_method_of_another_package_registered_by_a_call(kind, tmp_path) -> None:
    text, registered = BY_CALL[kind]
    environment = package(tmp_path, "own_method", text)
    code = f"{registered}OUT = {str(tmp_path / 'out')!r}\n{PROGRAM}"
    assert run(code, environment, tmp_path) == "all is well\n"


@pytest.mark.slow  # 10 s: a process of its own that imports torch and transformers
@pytest.mark.parametrize(
    ("kind", "point"),
    [("contract", "outer = own_method:OuterConfig"), ("hooks", "gain = own_method:register")],
)
def test_a_method_of_another_package_found_by_its_entry_point(kind, point, tmp_path) -> None:
    text, _ = BY_CALL[kind]
    environment = package(tmp_path, "own_method", text, point)
    name = point.split()[0].upper()
    code = (
        f"from peft_dist.catalog import config_class\nNAME = {name!r}\nConfig = config_class(NAME)\n"
        f"OUT = {str(tmp_path / 'out')!r}\n{PROGRAM}"
    )
    assert run(code, environment, tmp_path) == "all is well\n"


@pytest.mark.slow  # 20 s: a process of its own that runs all the laws on one method
def test_all_laws_run_on_a_method_of_another_package(tmp_path) -> None:
    environment = package(tmp_path, "own_method", CONTRACT, "outer = own_method:OuterConfig")
    (tmp_path / "own_cases.py").write_text(
        "from tests.contract.case import LINEAR, Case\nPARITY = {}\n"
        "CASES = (Case('OUTER', 'plain', {'size': 0.5}, LINEAR),)\n"
    )
    environment["PEFT_DIST_CASES"] = "own_cases"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/contract/test_laws.py", "-q", "-k", "OUTER", "-p", "no:cacheprovider"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].rsplit(maxsplit=1)[-1].lstrip("\n")) >= 20


@pytest.mark.slow  # 10 s: a process of its own
def test_a_yaml_job_knows_the_method(tmp_path) -> None:
    environment = package(tmp_path, "own_method", CONTRACT, "outer = own_method:OuterConfig")
    job = (
        (ROOT / "jobs" / "quickstart.yaml")
        .read_text()
        .replace("{type: lora, r: 8}", "{type: outer, size: 0.5}")
    )
    (tmp_path / "job.yaml").write_text(job)
    command = [sys.executable, "-m", "orchestrator", "validate", str(tmp_path / "job.yaml"), "--resolved"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "type: outer" in done.stdout and "size: 0.5" in done.stdout


@pytest.fixture
def restored():
    """The catalog and the enum, put back afterwards."""
    rows, members = dict(METHODS), list(peft_dist.PeftType)
    yield
    METHODS.clear()
    METHODS.update(rows)
    kind = peft_dist.PeftType
    for name in [name for name in kind._member_map_ if name not in members]:
        del kind._member_map_[name], kind._value2member_map_[name]
        kind._member_names_.remove(name)
        type.__delattr__(kind, name)


class Method(TargetedConfig, WeightMethod):
    """A method that does nothing."""

    prefix = "my_method_"

    def params(self, site):
        return {}

    def delta(self, p, base):
        raise NotImplementedError


class Plain(PeftConfig):
    """A config and no method."""


REFUSED = {
    "underscore": (
        {"name": "my_method_"},
        ConfigError,
        "'my_method_'; a name does not end in an underscore.",
    ),
    "capitals": ({"name": "My_method"}, ConfigError, "'My_method'; a name is of lower case."),
    "unknown": (
        {"name": "my_methods"},
        ConfigError,
        "PeftType has no 'MY_METHODS'. Closest: 'MY_METHOD'. Add it first: PeftType.extend('MY_METHODS').",
    ),
    "taken": ({"name": "lora"}, TakenError, "there is a method 'lora' already. Choose another name."),
    "prefix taken": (
        {"prefix": "ia3_"},
        TakenError,
        "the prefix 'ia3_' is that of 'ia3'. Choose another.",
    ),
    "other prefix": (
        {"prefix": "mine_"},
        ConfigError,
        "the prefix is 'mine_', but Method.prefix is 'my_method_'. They are to be the same.",
    ),
    "no config": (
        {"config_cls": int},
        ConfigError,
        "config_cls is <class 'int'>, no subclass of PeftConfig.",
    ),
    "no method": (
        {"config_cls": Plain},
        ConfigError,
        "Plain is no method by peft_dist.contract, and model_cls is None, no subclass of peft_dist.BaseTuner. "
        "One of the two is needed.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_no_mapping(case, restored) -> None:
    peft_dist.PeftType.extend("MY_METHOD")
    mappings = [
        getattr(peft_dist, f"PEFT_TYPE_TO_{kind}_MAPPING")
        for kind in ("CONFIG", "PREFIX", "TUNER", "MIXED_MODEL")
    ]
    before = [list(mapping) for mapping in mappings]
    more, error, message = REFUSED[case]
    with pytest.raises(error) as raised:
        peft_dist.register_peft_method(
            **{"name": "my_method", "config_cls": Method, "model_cls": None, **more}
        )
    assert str(raised.value) == f"register_peft_method: {message}"
    assert isinstance(raised.value, KeyError if error is TakenError else ValueError)
    assert [list(mapping) for mapping in mappings] == before


def test_what_is_registered_is_in_the_mappings(restored) -> None:
    member = peft_dist.PeftType.extend("MY_METHOD")
    assert peft_dist.PeftType.extend("MY_METHOD") is member is peft_dist.PeftType("MY_METHOD")
    peft_dist.register_peft_method(name="my_method", config_cls=Method, model_cls=None)
    assert peft_dist.PEFT_TYPE_TO_CONFIG_MAPPING["MY_METHOD"] is Method
    assert peft_dist.PEFT_TYPE_TO_PREFIX_MAPPING[member] == "my_method_"
    assert member not in peft_dist.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    with pytest.raises(TakenError):
        peft_dist.register_peft_method(name="my_method", config_cls=Method, model_cls=None)
    METHODS.pop("MY_METHOD")
    peft_dist.register_peft_method(
        name="my_method", config_cls=Method, model_cls=None, is_mixed_compatible=True
    )
    assert member in peft_dist.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_members_are_of_capitals() -> None:
    with pytest.raises(ConfigError) as raised:
        peft_dist.PeftType.extend("my method")
    assert str(raised.value) == (
        "PeftType.extend: 'my method'; a member is of capitals, digits and underscores, and does not end in one. "
        "Did you mean 'MY_METHOD'?"
    )


@pytest.mark.parametrize("kind", ["CONFIG", "TUNER", "PREFIX"])
def test_the_mappings_are_theirs(kind) -> None:
    """By the names of the classes; BONE is gone from HF PEFT."""
    mine = getattr(peft_dist, f"PEFT_TYPE_TO_{kind}_MAPPING")
    other = getattr(peft.mapping, f"PEFT_TYPE_TO_{kind}_MAPPING")
    for peft_type in mine:
        if peft_type != "BONE":
            theirs = other[peft.PeftType(str(peft_type))]
            assert getattr(mine[peft_type], "__name__", mine[peft_type]) == getattr(
                theirs, "__name__", theirs
            )
    tasks = peft_dist.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    assert {str(task): cls.__name__ for task, cls in tasks.items()} == {
        task: cls.__name__ for task, cls in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()
    }
