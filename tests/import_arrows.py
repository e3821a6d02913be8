"""Which room of lowmem_adam imports which, read from the sources; imports may point one way only."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "lowmem_adam"

# A room imports rooms of lower rank. Rooms of one rank may use one another as long as that makes no circle.
# The package's own __init__.py offers the optimizers, so it stands above them.
RANKS = {
    "layout": 0,
    "callers": 0,
    "phases": 0,
    "codec": 1,
    "dynamic_map": 1,
    "kernels": 2,
    "settings": 2,
    "cores": 1,
    "local": 1,
    "looks": 1,
    "wrapped": 1,
    "inputs": 2,
    "state": 3,
    "prepared": 3,
    "shard": 3,
    "shard_tensor": 3,
    "agreement": 3,
    "making": 3,
    "stepping": 3,
    "updating": 3,
    "repeating": 3,
    "compiled": 3,
    "resharding": 3,
    "reduction": 3,
    "saving": 3,
    "master": 3,
    "offload": 3,
    "stand_ins": 1,
    "host_gradients": 3,
    "gradients": 3,
    "in_backward": 5,
    "saved_state": 3,
    "foreign": 3,
    "decoded": 3,
    "zero": 3,
    "optimizer": 4,
    "checkpoint": 5,
    "spool": 3,
    "joining": 5,
    "stored": 5,
    "converting": 5,
    "verifying": 5,
    "ddp": 5,
    PACKAGE: 5,
    "integrations": 5,
    "plan": 5,
    "profile_plot": 4,
    "profiling": 5,
    "profile": 5,
    "commands": 6,
    "cli": 7,
}


def room_of(module: str) -> str:
    """lowmem_adam.kernels.cpu -> kernels; lowmem_adam itself -> lowmem_adam."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def is_room(name: str, package: Path) -> bool:
    return name in RANKS or (package / name).is_dir() or (package / f"{name}.py").exists()


def module_name(path: Path, package: Path) -> str:
    parts = [PACKAGE, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, package: Path) -> Iterator[str]:
    """Every import statement counts, also within functions and under TYPE_CHECKING."""
    here = module_name(path, package).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot means the package that holds this module, which for an __init__.py is the module itself.
            up = node.level - (path.name == "__init__.py")
            base = here[: len(here) - up] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from lowmem_adam import codec` names a room, `from lowmem_adam import AdamW8bit` the package.
            rooms = [alias.name for alias in node.names if source == PACKAGE and is_room(alias.name, package)]
            yield from (f"{PACKAGE}.{room}" for room in rooms)
            if len(rooms) < len(node.names):
                yield source


def wrong_arrows(package: Path) -> list[str]:
    """One sentence for each import that points the wrong way, for each circle and for each unknown room."""
    arrows: dict[tuple[str, str], str] = {}
    problems = []
    for path in sorted(package.rglob("*.py")):
        room, where = room_of(module_name(path, package)), str(path.relative_to(package))
        if room not in RANKS:
            problems.append(f"{where}: a room without a rank, add it to RANKS in {Path(__file__).name}")
            continue
        for module in imported_modules(path, package):
            if module.split(".")[0] == PACKAGE and room_of(module) != room:
                arrows.setdefault((room, room_of(module)), where)
    for (room, target), where in arrows.items():
        if target not in RANKS:
            problems.append(f"{where}: imports the unknown room {target}")
        elif RANKS[target] > RANKS[room]:
            problems.append(f"{where}: {room} imports {target}, which stands above it")
        elif (target, room) in arrows and RANKS[target] == RANKS[room]:
            problems.append(f"{where}: {room} and {target} import one another")
    return problems
