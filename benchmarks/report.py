"""Tables and pictures of the stored results: into README.md, benchmarks/README.md and beside the results.

    python benchmarks/report.py              # writes them
    python benchmarks/report.py --check      # writes nothing; exit status 1 where a table is not what the results give

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`, and is written anew from every folder
under benchmarks/results/ that has a results.jsonl and is no rehearsal; NAME is one of `tables.PAGES`. Each folder gets
a summary.md with all of its pages, and its pictures.

    python benchmarks/report.py FOLDER       # only that folder's summary, which it prints, and pictures
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from tables import PAGES, Results, summary  # noqa: E402

from gpu_mlp.bench import records  # noqa: E402

PAGES_WITH_TABLES = (HERE.parent / "README.md", HERE / "README.md")
MARKED = re.compile(r"(<!-- results: ([a-z]+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)


def stored(folder: Path = HERE / "results") -> dict[str, Results]:
    """By the name of its folder what was measured on a device; rehearsals left out."""
    files = sorted(folder.glob(f"*/{records.FILE}"))
    found = {file.parent.name: Results(records.read(file.parent)) for file in files}
    return {name: results for name, results in found.items() if results.header and not results.rehearsal}


def filled(text: str, results: dict[str, Results], where: Path = HERE) -> str:
    """A page with every marked place written anew. Raises ValueError for a mark that means nothing.

    where: the page's folder, from which pictures are linked.
    """

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in PAGES:
            raise ValueError(f"<!-- results: {name} -->: expected one of {', '.join(PAGES)}")
        return f"{match[1]}\n{told(name, results, where)}\n\n{match[4]}"

    return MARKED.sub(block, text)


def told(name: str, results: dict[str, Results], where: Path) -> str:
    """One page of every device that has it, with its picture."""
    blocks = []
    for folder, of in results.items():
        text, picture = PAGES[name][1](of), HERE / "results" / folder / f"{name}.png"
        link = f"![{PAGES[name][0]}]({picture.relative_to(where)})\n\n" if picture.exists() else ""
        if text:
            blocks.append(f"{of.title}:\n\n{link}{text}")
    return "\n\n".join(blocks) or "Not measured yet."


def write(results: dict[str, Results], pages: Sequence[Path] = PAGES_WITH_TABLES, check: bool = False) -> list[Path]:
    """Write every page; those that changed, or with ``check`` those that would."""
    changed = []
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = filled(before, results, page.parent)
        if after != before:
            changed.append(page)
            if not check:
                page.write_text(after, encoding="utf-8")
    return changed


def describe(folder: Path, results: Results) -> None:
    """The summary of a folder, and its pictures."""
    import plots

    (folder / "summary.md").write_text(summary(results), encoding="utf-8")
    plots.draw(folder, results)


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="one folder of results")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        results = Results(records.read(arguments.folder))
        if not results.header:
            sys.exit(f"{arguments.folder}: there is no {records.FILE} with a run in it")
        describe(arguments.folder, results)
        print((arguments.folder / "summary.md").read_text(encoding="utf-8"))
        return
    results_by_name = stored()
    if not arguments.check:  # pictures first: pages link those that there are
        for name, results in results_by_name.items():
            describe(HERE / "results" / name, results)
    changed = write(results_by_name, check=arguments.check)
    if arguments.check:
        sys.exit("\n".join(f"{page}: a table is not what the results give" for page in changed) or 0)
    print("\n".join(f"written: {page}" for page in changed) or "every table is what the results give")


if __name__ == "__main__":
    main()
