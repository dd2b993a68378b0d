"""The house stays in order: imports point downwards, nothing is circular, and light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = {
    "peft_dist": [
        {
            "contract", "catalog", "errors", "lazy", "linalg", "starts", "config", "folder", "aside", "pauses",
            "compiled",
        },
        {
            "foreign_engine", "base_layer", "fused", "packed", "targets", "sharding", "resting", "ranks", "pool",
            "pooled", "holders", "rows", "bins", "packed_rows", "lanes", "lane_products", "replicate", "siblings",
            "made", "layer_api", "loss", "recompute", "beside", "idle", "joint", "saved_tensors",
        },
        {"methods"},
        {"adapted", "tuner_layer"},
        {
            "inject", "merge", "checkpoint", "optim", "hooks", "prompts", "prompt_encoders", "ahead", "xlora",
            "savable", "calibration", "arithmetic", "lora_optimizers", "gradients",
        },
        {
            "model", "entry", "tuner", "tasks", "mixed", "compat", "loading", "registry", "status", "auto",
            "signatures", "scaling", "hotswap", "functional", "kbit", "merged",
        },
        {"__init__"},
    ],
    "orchestrator": [
        {"__init__", "errors", "spec", "home", "processes", "machine"},
        {
            "plan", "deepspeed_config", "objects", "stored", "journal", "lease", "store", "run_state",
            "registry", "keys", "spending", "lineage", "identity", "gate", "adapter_folder", "model_folder",
            "weights_table", "cluster", "local_ray", "keeper", "devices", "chat_template", "runner", "ask", "typed_ask",
            "tracking",
        },
        {"service", "train", "merging"},
        {"sweep", "serve", "submit"},
        {"wiring"},
        {"api", "terminal", "cli", "__main__"},
    ],
}  # fmt: skip

# Folders of one package, each of which may import those before it.
FOLDERS = {
    "orchestrator.train": ["rows", "tasks", "worker", "driver"],
    "orchestrator.serve": ["engines", "rollouts", "routes", "proxy"],
}


def modules(package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / package).rglob("*.py")
    }


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the project that `name` imports anywhere in its text, in-function imports counted."""
    found = set()
    parts = name.split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    package = [part for part in package if part != "__init__"]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
            # `from package import module` uses the module; any other name comes from the package itself
            targets = [name if module_at(name, known) else stem for name in names]
        else:
            continue
        found |= {module for target in targets if (module := module_at(target, known))}
    return found - {name, ".".join([*package, "__init__"])}


def module_at(dotted: str, known: set[str]) -> str | None:
    return next((name for name in (dotted, f"{dotted}.__init__") if name in known), None)


def layer_of(module: str) -> int:
    package, *rest = module.split(".")
    room = rest[0] if rest else "__init__"
    for number, rooms in enumerate(LAYERS[package]):
        if room in rooms:
            return number
    raise AssertionError(f"{module} has no layer: give it one in LAYERS and in docs/architecture.md")


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_downwards(package):
    known = modules("peft_dist") | modules("orchestrator")
    wrong = []
    for name, path in modules(package).items():
        for target in imports(name, path, set(known)):
            if target.split(".")[0] != package:
                if package == "peft_dist":
                    wrong.append(f"{name} imports {target}: peft_dist may not know the orchestrator")
            elif layer_of(target) > layer_of(name):
                wrong.append(f"{name} (layer {layer_of(name)}) imports {target} (layer {layer_of(target)})")
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_import_those_before_them(package):
    order = FOLDERS[package]
    known = modules("peft_dist") | modules("orchestrator")
    wrong = []
    for number, folder in enumerate(order):
        inside = {name: path for name, path in known.items() if name.startswith(f"{package}.{folder}.")}
        assert inside, f"{package} has no folder {folder}"
        for name, path in inside.items():
            for target in imports(name, path, set(known)):
                if any(target.startswith(f"{package}.{later}.") for later in order[number + 1 :]):
                    wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_is_circular():
    known = modules("peft_dist") | modules("orchestrator")
    graph = {name: imports(name, path, set(known)) for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "a circle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def in_function_imports(path: Path) -> list[int]:
    return [
        inner.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    ]


def test_imports_stand_at_the_top():
    known = modules("peft_dist") | modules("orchestrator")
    late = {name: lines for name, path in known.items() if (lines := in_function_imports(path))}
    late.pop("orchestrator.wiring", None)
    assert not late


HEAVY = ("torch", "ray", "transformers", "deepspeed", "datasets")


@pytest.mark.parametrize(
    "statement",
    [
        "import orchestrator.spec.load, orchestrator.plan, orchestrator.registry, orchestrator.store",
        "import orchestrator.cli, orchestrator.api",
        "import importlib, pkgutil, peft_dist.catalog, peft_dist.methods as m\n"
        "[importlib.import_module(i.name) for i in pkgutil.walk_packages(m.__path__, 'peft_dist.methods.')]",
    ],
)
def test_light_parts_leave_the_heavy_packages_out(statement):
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert loaded.stdout.split() == []


def test_file_names_say_something():
    banned = {"utils", "helpers", "common", "misc"}
    assert not [
        name for name in modules("peft_dist") | modules("orchestrator") if banned & set(name.split("."))
    ]
