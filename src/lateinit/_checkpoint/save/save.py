"""Put the steps of a save together: of whole tensors, or of the shards of each rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lateinit._checkpoint.save.atomic_output import (
    check_room,
    check_target,
    returned,
    staged,
    was_interrupted,
)
from lateinit._checkpoint.save.companions import companions, metadata_of
from lateinit._checkpoint.save.manifest import Item, ShardFile, collect, divide
from lateinit._checkpoint.save.pipeline import write_shards
from lateinit._checkpoint.save.resume_digest import fingerprint
from lateinit._checkpoint.save.whole_files import WholeFiles
from lateinit._distributed import Agreement, is_running, ranks_of
from lateinit._identity import IdentityMap
from lateinit._integrations import weights_stem
from lateinit._log import log
from lateinit._materialize import Filling, check_seed
from lateinit._progress import Progress
from lateinit._replay import recorded_seed
from lateinit._tensors import Casting, Init, Rules, bound_in, find_tensors
from lateinit._units import format_bytes
from lateinit.errors import ShardingError

# Bytes of tensors in memory at once while a single file is written: the default of
# `max_shard_size`, which bounds them in a folder.
_ROOM = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Saved:
    """What ``save_checkpoint`` wrote; ``nbytes`` counts the tensors' bytes, without headers.

    With ``wait=False`` it is still being written, and ``files`` are those of ``result()``.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    seed: int | None
    _future: Future[Saved] | None = field(default=None, repr=False, compare=False)

    def result(self, timeout: float | None = None) -> Saved:
        """Wait until the output is in its place, and return what was written.

        Args:
            timeout: the most seconds to wait; by default without limit.

        Raises:
            TimeoutError: the save took longer.
            CheckpointError: a rank could not write. The earlier output is as it was.
        """
        return self if self._future is None else self._future.result(timeout)

    def __str__(self) -> str:
        files = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        return f"{self.path}: {self.tensors} tensors, {format_bytes(self.nbytes)}, in {files}"


class Asked(NamedTuple):
    """The arguments of ``save_checkpoint``, checked: see there."""

    casts: Casting
    init: Init | None
    limit: int
    force: bool
    seed: int | None
    resume: bool
    format: str | None
    wait: bool
    progress: bool


def save_files(
    module: nn.Module | Mapping[str, Tensor], target: Path, asked: Asked, *, one_file: bool
) -> Saved:
    """Write a module without shards: one safetensors file, or a folder of them."""
    check_target(target, force=asked.force or was_interrupted(target))  # `staged` looks again
    items = collect(module, asked.casts, init=asked.init, seed=asked.seed)
    shards = (
        divide(items, None, target.name)
        if one_file
        else divide(items, asked.limit, None, weights_stem(module))
    )
    recorded, seed = _seeds(module, items, asked.seed)
    metadata = metadata_of(recorded if seed is None else seed)
    nbytes = sum(shard.nbytes for shard in shards)
    check_room(target, nbytes)
    # The digest also decides whether the files of a killed save may be kept.
    request = fingerprint(shards, metadata, seed)
    with staged(target, request, resume=asked.resume, force=asked.force) as stage:
        with Progress("write", nbytes, shown=asked.progress) as bar:
            room = _ROOM if one_file else asked.limit
            write_shards(stage, shards, metadata, seed=seed, room=room, bar=bar)
        if not one_file:
            for name, text in companions(module, shards).items():
                stage.write_text(name, text)
        files = tuple(sorted(path.name for path in stage.files.iterdir()))
    saved = Saved(target, files, len(items), nbytes, recorded if seed is None else seed)
    log.info("saved %s", saved)
    return returned(target, saved)


def save_shards(module: nn.Module | Mapping[str, Tensor], target: Path, asked: Asked) -> Saved:
    """Have each rank write its shards."""
    # Importing it imports torch.distributed.checkpoint, which takes more than a second.
    from lateinit._checkpoint.save.sharded import ShardedSave  # noqa: PLC0415

    if not (asked.wait or is_running()):
        raise ShardingError(
            "wait=False: there is no process group; call torch.distributed.init_process_group() "
            "on every rank first"
        )
    again = asked.force or was_interrupted(target)
    ranks = ranks_of(module, "save_checkpoint()")
    with ranks.together("preparing") as phase:
        items = collect(module, asked.casts, sharded=True, init=asked.init, seed=asked.seed)
        known, seed = _seeds(module, items, asked.seed)
        filling = Filling(module, seed=seed, rules=Rules(asked.init, find_tensors(module)))
        filling.check()
        if ranks:
            dtypes = IdentityMap((item.tensor, item.entry.dtype) for item in items)
            phase.compared = Agreement(
                ranks.shards, filling.left(), seed, lambda shard: dtypes.get(shard, shard.dtype)
            )
        shown = known if seed is None else seed
        # DCP loads into a state dict, which has every name of a tied tensor.
        named = {name: item for item in items for name in (item.entry.name, *item.aliases)}
        shards, files = [ShardFile("", tuple(items))], None
        if asked.format == "safetensors":
            named = {item.entry.name: item for item in items}
            shards = divide(items, asked.limit, None, weights_stem(module))
            files = WholeFiles(shards, metadata_of(shown))
        save = ShardedSave(target, named, files, seed, shown=asked.progress)
    nbytes = sum(item.entry.nbytes for item in items)

    def done() -> Saved:
        written = tuple(sorted(path.name for path in target.iterdir()))
        return Saved(target, written, len(items), nbytes, shown)

    try:
        texts = companions(module, shards)
        said = f"format={asked.format or 'dcp'!r}, max_shard_size={asked.limit}, wait={asked.wait}"
        save.open(texts, nbytes, said, force=again, discard=again or asked.resume)
        if not asked.wait:
            return Saved(target, (), len(items), nbytes, shown, save.start(done))
        save.run()
    except BaseException:
        save.close()
        raise
    return done()


def _seeds(
    module: nn.Module | Mapping[str, Tensor], items: Iterable[Item], seed: int | None
) -> tuple[int | None, int | None]:
    """The seed from which all constructions started, if known, and the seed to replace it, if any.

    The replacing seed is dropped if it is the recorded one, since it would change nothing.
    """
    programs = dict.fromkeys(i.deferred.program for i in items if i.deferred is not None)
    recorded = {recorded_seed(program) for program in programs}
    known = recorded.pop() if len(recorded) == 1 else None
    if seed is not None and seed == known:
        return known, None
    for program in programs | bound_in(module):
        check_seed(program, seed)
    return known, seed
