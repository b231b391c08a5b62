"""The invariants of the house, each guarded by a small test: docs/architecture.md says what they are for."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib.util
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

import lcmlora
from conftest import PIPES, sd_pipe
from lcmlora import live, testing
from lcmlora.sheets import metrics

PACKAGE = Path(lcmlora.__file__).parent
SIGNATURES = Path(__file__).with_name("signatures.txt")
RANKS = (
    ("errors", "quiet"),
    ("warn", "compat", "tables", "writing", "pages"),
    ("devices", "progress"),
    ("layers",),
    ("base", "lora"),
    ("recipe",),
    ("parameters", "policy", "calls", "prompts", "compiling", "vae"),
    ("transition",),
    ("calling", "moving"),
    ("baked",),
    ("acceleration", "state"),
    ("meanwhile",),
    ("pictures",),
    ("sheets", "kinds", "baking", "pocket", "loading", "testing", "distillation"),
    ("benchmarking",),
    ("generating",),
    ("demo", "live"),
    ("cli", "__main__"),
)
"""Each module or folder may import from its own row and from those above."""
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
SOURCES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in SOURCES.items()}


# -- which way imports go ---------------------------------------------------------------------------------------------


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The package's own modules that one imports from, wherever in it."""
    here = module.split(".") if SOURCES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            front = ".".join(part for part in origin if part)
            names = [f"{front}.{alias.name}".lstrip(".") for alias in node.names]
            yield from (name if name in SOURCES else front for name in names if name in SOURCES or front)


def at_run_time(tree: ast.Module) -> ast.Module:
    """A module without what only a type checker reads, and without what functions import late."""
    body = [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef | ast.If)]
    return ast.Module(body, [])


def test_every_module_has_a_rank_and_imports_only_from_its_own_or_lower_ones():
    ours = {module.partition(".")[0] for module in SOURCES} - {"__init__"}
    assert ours == RANK.keys()
    wrong = [
        f"{module} imports {other}"
        for module, tree in TREES.items()
        for other in imports(module, tree)
        if module != "__init__" and RANK[other.partition(".")[0]] > RANK[module.partition(".")[0]]
    ]
    assert wrong == []


def test_no_imports_go_in_circles():
    graph = {module: set(imports(module, at_run_time(tree))) - {module} for module, tree in TREES.items()}
    assert len(graph["acceleration"]) > 8
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "code",
    [
        "import lcmlora.cli",
        "from lcmlora.cli import main; main(['--help'], '', None, False)",
        "assert lcmlora.pocket.STYLE.is_dir()",
    ],
)
def test_import_and_help_load_nothing_heavy(code):
    heavy = (
        "torch",
        "diffusers",
        "peft",
        "transformers",
        "numpy",
        "PIL",
        "gradio",
        "matplotlib",
        "jinja2",
        "datasets",
    )
    code = f"import sys, lcmlora; {code}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# -- what stands in one file only -------------------------------------------------------------------------------------


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_") and name != "_"


def own_names(tree: ast.AST) -> set[str]:
    """The private names that a module gives to things of its own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def foreign_names(tree: ast.AST) -> set[str]:
    """Private names in a module that it has not given itself: attributes, and strings that read like them."""
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier()
    }
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {name for name in used | imported if private(name)} - own_names(tree)


def test_private_names_of_other_libraries_stand_in_compat_only():
    ours = {"_lcmlora", "_lcmlora_plain"}
    found = {module: names for module, tree in TREES.items() if (names := foreign_names(tree) - ours)}
    assert len(found.pop("compat")) > 5
    assert found == {}


def test_the_records_attribute_is_written_in_one_file():
    written = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Constant) and node.value == "_lcmlora")
        or (isinstance(node, ast.Attribute) and node.attr == "_lcmlora")
    }
    assert written == {"transition.records"}


# -- warnings ---------------------------------------------------------------------------------------------------------


def test_there_is_one_way_to_warn():
    for module, tree in TREES.items():
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", None) for f in called}
        if "warn" in names and module != "warn":
            assert "warn" in imports(module, tree), module
            assert not any(isinstance(f, ast.Attribute) and f.attr in ("warn", "warn_explicit") for f in called), (
                module
            )


WARNINGS = {
    "guidance above 2": "pipe('x', guidance_scale=7.5)",
    "many steps": "pipe('x', num_inference_steps=9)",
    "an argument without effect": "pipe('x', negative_prompt='y')",
    "a scheduler put in": "pipe.scheduler = others['euler']\npipe('x')",
    "inside a sheet": "lcmlora.sweep_guidance(pipe, 'x', (3,))",
    "inside a nested function": "(lambda: [pipe('x', guidance_scale=7.5)])()",
    "through torch": "import torch\ntorch.no_grad()(pipe.__call__)('x', guidance_scale=7.5)",
    "the plan": "lcmlora.accelerate(others['v'], lora=file)",
    "inside a block": "with lcmlora.accelerated(others['v'], lora=file):\n    pass",
    "the way back": "pipe.scheduler = others['euler']\nlcmlora.restore(pipe)",
    "the way back, from a block": (
        "with lcmlora.accelerated(others['plain'], lora=file) as p:\n    p.scheduler = others['euler']"
    ),
    "a change undone": "pipe.unet.mid_block.resnets[0].conv1.weight.data.add_(1)\nlcmlora.restore(pipe)",
    "a strength without room": "others['img2img']('x', image=picture, strength=.04)",
}


@pytest.fixture
def others(lcm_file):
    plain, img2img, v = sd_pipe(), sd_pipe(cls=StableDiffusionImg2ImgPipeline), sd_pipe()
    v.scheduler = EulerDiscreteScheduler.from_config(v.scheduler.config, prediction_type="v_prediction")
    lcmlora.accelerate(img2img, lora=lcm_file(img2img))
    euler = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    return {"plain": plain, "img2img": img2img, "v": v, "euler": euler}


@pytest.mark.parametrize(
    ("what", "name"),
    [*((what, "my_torch_app") for what in WARNINGS), ("the plan", "torchdiffusers"), ("the plan", "lcmlora_extras")],
)
def test_the_file_of_a_warning_is_the_callers(what, name, tmp_path, lcm_file, others):
    pipe, file = sd_pipe(), lcm_file(sd_pipe())
    lcmlora.accelerate(pipe, lora=file)
    lines = [
        "import lcmlora",
        "def use(pipe, others, file, picture):",
        *("    " + n for n in WARNINGS[what].split("\n")),
    ]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    users = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(users)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        users.use(pipe, others, file, Image.new("RGB", (16, 16), "teal"))
    ours = [w for w in told if issubclass(w.category, lcmlora.LcmLoraWarning)]
    assert ours
    assert {w.filename for w in ours} == {str(tmp_path / f"{name}.py")}


# -- classes of others ------------------------------------------------------------------------------------------------


def classes_of_others() -> dict[type, dict[str, object]]:
    """Every class of the frameworks that is loaded, and what stands in it."""
    frameworks = ("diffusers", "peft", "transformers", "torch")
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in frameworks]
    found = {thing for module in modules for thing in vars(module).values() if isinstance(thing, type)}
    return {cls: dict(vars(cls)) for cls in found if cls.__module__.partition(".")[0] in frameworks}


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_no_class_of_others_is_patched(fuse, lcm_file):
    pipe = sd_pipe()
    pipe("x", num_inference_steps=1)
    before = classes_of_others()
    assert StableDiffusionPipeline in before
    assert LCMScheduler in before
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), fuse=fuse)
    pipe("x")
    after = classes_of_others()
    for cls, members in before.items():
        assert after[cls].keys() == members.keys(), cls
        changed = [name for name, value in members.items() if after[cls][name] is not value]
        assert changed == [], cls


@pytest.mark.parametrize("kind", PIPES)
def test_an_accelerated_pipe_keeps_its_names(kind, lcm_file):
    pipe = PIPES[kind]()
    plain = type(pipe)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    assert type(pipe) is not plain
    assert isinstance(pipe, plain)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(pipe), name) == getattr(plain, name)
        assert getattr(type(pipe).__call__, name) == getattr(plain.__call__, name)
    assert pipe.__call__.__wrapped__ is plain.__call__.__wrapped__
    assert inspect.signature(type(pipe)) == inspect.signature(plain)
    assert inspect.signature(type(pipe).__call__) == inspect.signature(plain.__call__)


# -- size -------------------------------------------------------------------------------------------------------------


def body_length(function: ast.FunctionDef) -> int:
    """Lines of what a function does, its signature and docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_a_function_is_read_in_one_look_and_a_module_in_one_sitting():
    long = {
        f"{module}.{node.name}": body_length(node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and body_length(node) > 40
    }
    assert long == {}
    assert {m: n for m, file in SOURCES.items() if (n := len(file.read_text().splitlines())) > 500} == {}


class Counted(dict):
    """A module's children, and how often somebody went through all of them."""

    walks = 0

    def items(self):
        self.walks += 1
        return super().items()

    def values(self):
        self.walks += 1
        return super().values()


@pytest.mark.parametrize("kind", PIPES)
def test_one_accelerate_walks_over_the_unet_at_most_twice(kind, lcm_file):
    """Whatever walks over a model asks its root for its children: torch's `named_modules`, and our own walk."""
    pipe = PIPES[kind]()
    file = lcm_file(pipe)
    counted = pipe.unet.__dict__["_modules"] = Counted(pipe.unet._modules)
    list(pipe.unet.named_modules())
    assert counted.walks == 1
    lcmlora.accelerate(pipe, lora=file, fuse=True)
    assert 1 < counted.walks <= 3
    lcmlora.accelerate(pipe, lora=file, steps=6)
    assert counted.walks <= 4


# -- the public surface -----------------------------------------------------------------------------------------------


def surface() -> str:
    """Every public name with its signature; a class with its fields and methods."""
    lines = []
    public = {lcmlora: lcmlora.__all__, testing: ("tiny_lora", "tiny_pipeline")}
    public[live] = live.__all__
    public[metrics] = ("clip_score", "distance", "lpips", "measured", "pick_score")
    for home, names in public.items():
        for name in names:
            lines += described(f"{home.__name__}.{name}", getattr(home, name))
    return "\n".join(lines) + "\n"


def described(name: str, thing: object) -> Iterator[str]:
    if not isinstance(thing, type):
        yield f"{name}{inspect.signature(thing)}"
        return
    if issubclass(thing, Exception):
        yield f"{name}({', '.join(base.__name__ for base in thing.__bases__)})"
        return
    yield f"{name}{inspect.signature(thing)}"
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    for member, value in sorted(vars(thing).items()):
        if member.startswith("_") or member in fields:
            continue
        value = getattr(value, "__func__", value)
        yield f"{name}.{member}{inspect.signature(value) if callable(value) else ''}"


def test_a_change_of_the_public_surface_is_a_change_of_signatures_txt():
    assert surface() == SIGNATURES.read_text(encoding="utf-8"), (
        "The public surface changed. If that is meant: PYTHONPATH=src python tests/test_house.py writes "
        "tests/signatures.txt anew; CHANGELOG.md tells users."
    )


if __name__ == "__main__":
    SIGNATURES.write_text(surface(), encoding="utf-8")
