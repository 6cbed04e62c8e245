"""Rows that one stage of a chain makes and another learns from: `dpo@2.data=stage:generate@2`.

They do not exist yet when `prepare` runs. They are checked, split and tokenised in the same way, right before
the stage that reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf.config import ConfigError, did_you_mean
from rlhf.costs.setup import CostContext
from rlhf.data.preparation import NoRowsError, Sources
from rlhf.data.prepared import LengthStats, PreparedData
from rlhf.data.schema import Split
from rlhf.data.sources import SourceConfig
from rlhf.models.base import BaseModelFiles
from rlhf.pipeline.abilities import MakesRows
from rlhf.pipeline.graph import made_roles, named_sources, roles_of, row_makers
from rlhf.pipeline.recipe import kind_of
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Artifact
from rlhf.tracking.progress import Progress


def check_row_makers(chain: Mapping[str, Stage]) -> None:
    """Refuse a source that names a stage which makes no such rows.

    Raises:
        ConfigError: in the user's own keys.
    """
    sources = named_sources(chain)
    roles, known = sources.roles, sources.makers()
    for role, source in sources.named.items():
        if isinstance(source, list) and any(each.stage for each in source):
            raise ConfigError(f"{roles[role].key}: `stage:` has no place in a list. Name files.")
    for role, maker in known.items():
        _check_offer(role, maker, chain)
    for role in roles:
        other = sources.lender(role)
        if other in known:
            raise ConfigError(
                f"{roles[role].key}={roles[other].key}: rows of {sources.named[other]} are not there yet "
                f"when prompts are split. Name another source for {roles[role].key}."
            )


def maker_of(name: str, chain: Mapping[str, Stage]) -> MakesRows:
    """The stage of this name; `check_row_makers` has checked that it makes rows."""
    stage = chain[name]
    assert isinstance(stage, MakesRows)
    return stage


def check_made_rows(stage: Stage, chain: Mapping[str, Stage]) -> None:
    """Refuse a source of rows that is certain to be empty.

    Raises:
        ConfigError: in the user's own keys.
    """
    for role, source in made_roles(stage, chain).items():
        assert source.stage is not None
        maker_of(source.stage, chain).check_offers(f"{roles_of(chain)[role].key}={source}", chain)


def data_of(stage: Stage, prepared: Path, chain: Mapping[str, Stage], made: Path) -> PreparedData:
    """The prepared data as a stage reads it.

    Args:
        prepared: the artifact of `prepare`.
        made: the directory of the rows that another stage made; it may still be empty.
    """
    known = named_sources(chain).makers()
    names = {role: stage.mount.own_role(role) for role in stage.reads().roles}
    return PreparedData(
        prepared,
        {
            role: (made if name in known else prepared, name)
            for role, name in names.items()
            if name != role or name in known
        },
        roles_of(chain),
    )


def prepare_rows(
    stage: Stage,
    chain: Mapping[str, Stage],
    inputs: Mapping[str, Artifact],
    base: BaseModelFiles,
    directory: Path,
    progress: Progress,
) -> None:
    """Prepare the rows that a stage reads and other stages made.

    Raises:
        ConfigError: in the user's own keys; a split has no rows.
    """
    wanted, roles = made_roles(stage, chain), roles_of(chain)
    prepare: Any = chain["prepare"]
    directory.mkdir()
    with TemporaryDirectory(prefix="rows.", dir=directory, ignore_cleanup_errors=True) as scratch:
        try:
            files = {role: _made_file(role, wanted[role], chain, inputs) for role in wanted}
            sources = Sources(roles, dict.fromkeys(roles) | files)
            preparation = prepare.preparation(sources, base, Path(scratch))
            preparation.prepare(progress)
        except NoRowsError as error:
            advice = [maker_of(maker, chain).offer_advice() for maker in row_makers(stage, chain)]
            raise ConfigError(" ".join([str(error), *advice])) from None
        preparation.write(directory)
        makers = {role: source.stage for role, source in wanted.items() if source.stage}
        preparation.show(progress.console, makers)


def context_of(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> CostContext:
    """The context with the lengths of a stage's data; for rows that are not made yet, upper bounds."""
    known, sizes = named_sources(chain).makers(), on.sizes

    def size(role: str, split: Split) -> LengthStats:
        name = stage.mount.own_role(role)
        if name not in known:
            return sizes(name, split)
        maker = maker_of(known[name], chain)
        stats = maker.offered_lengths(context_of(maker, chain, on), chain)
        share = dict(chain["prepare"])["held_out_fraction"]
        return stats._replace(rows=max(1, round(stats.rows * (share if split == "held_out" else 1 - share))))

    names = {role: stage.mount.own_role(role) for role in stage.reads().roles}
    is_other = any(name != role or name in known for role, name in names.items())
    return replace(on, sizes=size) if is_other else on


def _check_offer(role: str, maker: str, chain: Mapping[str, Stage]) -> None:
    setting = f"{roles_of(chain)[role].key}=stage:{maker}"
    if maker not in chain:
        raise ConfigError(f"{setting}: there is no such stage.{did_you_mean(maker, chain)}")
    offering = [
        name
        for name, stage in chain.items()
        if isinstance(stage, MakesRows) and kind_of(role) in stage.offers
    ]
    if maker not in offering:
        others = f"Stages that do: {', '.join(offering)}." if offering else "No stage does. Name a file."
        raise ConfigError(f"{setting}: {maker} makes no such rows. {others}")


def _made_file(
    role: str, source: SourceConfig, chain: Mapping[str, Stage], inputs: Mapping[str, Artifact]
) -> SourceConfig:
    assert source.stage is not None
    path = inputs[source.stage].path / maker_of(source.stage, chain).offers[kind_of(role)]
    if path.stat().st_size == 0:
        key = roles_of(chain)[role].key
        raise NoRowsError(f"{key}=stage:{source.stage}: {source.stage} made no rows.")
    return source.model_copy(update={"stage": None, "path": str(path)})


def roles_read(stages: Iterable[Stage], chain: Mapping[str, Stage]) -> Iterator[str]:
    """The roles that these stages need and whose rows `prepare` reads."""
    known = named_sources(chain).makers()
    for stage in stages:
        yield from (name for name in map(stage.mount.own_role, stage.needs(chain)) if name not in known)
