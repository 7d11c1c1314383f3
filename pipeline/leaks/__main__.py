"""The leak check alone, without labels, params, DVC and torch: `winnow-leaks`, or `python -m pipeline.leaks`.

Exit code 0: no copy was found. 1: copies were found. 2: the call or the data cannot be used. 3: a defect of winnow.
75: a disk or a process failed. 130: interrupted.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.harness.machine import Machine
from pipeline.harness.stage import exit_codes
from pipeline.leaks import decision, findings, gallery
from pipeline.leaks.decision import Dedup
from pipeline.leaks.search import search
from pipeline.sources.checking import check_images, reasons_of, refused_of
from pipeline.sources.folder import Folder
from pipeline.sources.listing import Listing, at_address, kind_of, list_files
from pipeline.sources.parquet import Parquet
from pipeline.sources.source import SourceError
from pipeline.sources.tar import Tar
from pipeline.sources.tars import Tars
from pipeline.store import artifact, decode, manifest
from pipeline.store.manifest import Manifest
from pipeline.store.remote import Object, is_remote

COPIES, DEFECT = 1, 3
SHOWN = 10  # copies named in the summary
GALLERY, SUMMARY, REFUSED = "index.html", "summary.json", "refused.parquet"
OUTCOMES = {
    "copy": "copies of a reference image",
    "alike": "look-alikes",
    "review": "for review: they share features with one",
    "unverifiable": "with too few features to be checked",
}
"""The outcomes of candidates, as the summary names them."""


def main() -> None:
    args = _parsed(sys.argv[1:])
    try:
        with exit_codes("it begins anew"):
            sys.exit(COPIES if run(args) else 0)
    except Exception:
        traceback.print_exc()
        sys.exit(DEFECT)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="winnow-leaks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    what = "a folder of images, an uncompressed tar, a Parquet table with image bytes, or a quoted pattern that names several"
    add("reference", metavar="REFERENCE", help=f"the images that must not leak: {what}")
    add("candidates", metavar="CANDIDATES", help="the images that are searched for copies of these: likewise")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write leaks.parquet (the findings), index.html (a gallery) and a summary there",
    )
    add(
        "--strictness",
        choices=("leaks", "near", "nearer"),
        default="leaks",
        help="what counts as a copy: copies (leaks, the default), or also look-alikes: a correlation of 0.9 (near), 0.8 (nearer)",
    )
    add("--review", choices=("keep", "remove"), default="keep", help="remove: what is for review counts as a copy")
    add(
        "--overrides",
        type=Path,
        metavar="FILE",
        help="a CSV of id,action,reason: a person's word on candidates (keep, remove)",
    )
    add("--image", default="image", metavar="COLUMN", help="the column of image bytes of Parquet tables (default: image)")
    add("--workers", type=int, default=0, metavar="N", help="processes (default: one for each core)")
    add("--work", type=Path, metavar="FOLDER", help="where temporary files go (default: the system's folder for them)")
    return parser.parse_args(argv)


class Checked(NamedTuple):
    """Images that can be compared, and the others with their reasons."""

    images: Manifest
    refused: pa.Table


def run(args: argparse.Namespace) -> int:
    """Search, decide, tell; returns how many candidates would go. Raises UserError for what cannot be used."""
    if importlib.util.find_spec("faiss") is None:
        raise UserError("faiss is not installed, in which features are searched for. Say `pip install 'winnow-vision[leaks]'`.")
    params = Dedup(strictness=args.strictness, review=args.review)
    machine = Machine(workers=max(0, args.workers))
    if args.out is not None:
        _expect_ours(args.out)
    with tempfile.TemporaryDirectory(prefix="winnow-leaks-", dir=args.work) as work:
        checked = {
            name: _checked(name, getattr(args, name), args.image, Path(work), machine) for name in ("reference", "candidates")
        }
        sets = {"val": checked["reference"].images, "pool": checked["candidates"].images}
        sets |= dict.fromkeys(("train", "holdout"), Manifest(manifest.SCHEMA.empty_table(), ()))
        overrides = decision.read_overrides(args.overrides, sets) if args.overrides else {}
        found = search(sets["pool"], {"val": sets["val"]}, False, Path(work), machine)
        audit = decision.decide(found, params, overrides, sets)
        summary = _summary(audit, checked)
        if args.out is not None:
            with artifact.writing(args.out) as tmp:
                findings.write(tmp, audit)
                workers = machine.cores(machine.workers)
                gallery.write(tmp, audit, sets, params, overrides, [], _identity(found), workers, "give --overrides that file")
                (tmp / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
                refused = [
                    part.refused.set_column(4, "role", pa.repeat(name, len(part.refused))) for name, part in checked.items()
                ]
                pq.write_table(pa.concat_tables(refused), tmp / REFUSED, compression="zstd")
    sys.stdout.write(_told(summary, audit, args))
    return int(summary["going"])


def _identity(found: pa.Table) -> str:
    """By which a browser keeps the decisions on these findings."""
    digest = hashlib.sha256()
    for name in ("relation", "id", "match_id", "rule"):
        digest.update(json.dumps(found[name].to_pylist()).encode())
    return digest.hexdigest()


def _expect_ours(out: Path) -> None:
    """What stands at `out` is replaced, so it must be the output of an earlier check."""
    if (
        out.exists()
        and not ((out / SUMMARY).is_file() and (out / artifact.CHECKSUMS).is_file())
        and (not out.is_dir() or any(out.iterdir()))
    ):
        raise UserError(f"--out {out} is there, and was not written by a leak check: it would be replaced. Name another folder.")


def _checked(name: str, given: str, column: str, work: Path, machine: Machine) -> Checked:
    """The images of one side, all decoded once, as `prepare` does it. Raises SourceError where none can be used."""
    elsewhere = at_address(given) if is_remote(given) else None
    if elsewhere is None:
        root, pattern = _split(given)
        first: Path | Object = root if pattern == "." else next(iter(sorted(root.glob(pattern))), root / pattern)
    else:
        root, (pattern, first) = Path(), next(iter(elsewhere.objects.items()))
    kind = kind_of(first)
    if kind in ("list", "file"):
        raise SourceError(
            f"{first} is neither a folder nor a tar nor a Parquet table: put the images of {name} into one of these."
        )
    source = (
        Parquet(kind="parquet", path=pattern, image=column)
        if kind == "parquet"
        else Tar(kind="tar", path=pattern)
        if kind == "tar"
        else Folder(kind="folder", path=pattern)
    )
    folder = work / f"{name}-images"
    folder.mkdir()
    listing = check_images(
        list_files([source], "pool", root, Tars(folder, folder), f"leaks: {name}", elsewhere=elsewhere),
        _size_of,
        machine.cores(machine.workers),
        f"leaks: {name}",
    )
    refused = refused_of(listing)
    if len(refused) == len(listing.table):
        told = ", ".join(f"{n} x {reason}" for reason, n in reasons_of(refused).items()) or "it holds no files"
        raise SourceError(f"{given} has no readable image: {told}.")
    return Checked(_manifest(listing), refused)


def _split(given: str) -> tuple[Path, str]:
    """A root, and a pattern below it: `.` for what is there by this name, else from the first part with a wildcard on."""
    path = Path(given)
    if path.exists():
        return path, "."
    parts = path.parts
    at = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if at is None or not Path(*parts[:at]).is_dir():
        raise SourceError(f"{given} is not there. Expected: a folder of images, an uncompressed tar or a Parquet table.")
    return Path(*parts[:at]), str(Path(*parts[at:]))


def _size_of(data: bytes) -> tuple[int, int]:
    height, width, _ = decode.decode(data).shape
    return width, height


def _manifest(listing: Listing) -> Manifest:
    good = listing.table.filter(pc.is_null(listing.table["reason"]))
    table = good.append_column(manifest.SCHEMA.field("label"), pa.nulls(len(good), pa.int32()))
    table = table.select(manifest.SCHEMA.names).cast(manifest.SCHEMA).sort_by("id")
    if pc.count_distinct(table["id"]).as_py() < len(table):
        twice = next(row["values"] for row in pc.value_counts(table["id"]).to_pylist() if row["counts"] > 1)
        raise SourceError(f"the image {twice} occurs twice: a name may occur once in a tar.")
    return Manifest(table.unify_dictionaries().combine_chunks(), ())


# What is told ---------------------------------------------------------------------------------------------------------


def _summary(audit: pa.Table, checked: Mapping[str, Checked]) -> dict[str, Any]:
    """Distinct images, as `findings.counts` counts them for the gallery."""
    images = findings.counts(audit)
    of_pool = audit.filter(pc.or_(pc.equal(audit["relation"], "pool"), pc.equal(audit["relation"], "pool-val")))
    copies = of_pool.filter(pc.equal(of_pool["outcome"], "copy"))
    return {
        "reference": len(checked["reference"].images),
        "candidates": len(checked["candidates"].images),
        "refused": {name: reasons_of(part.refused) for name, part in checked.items()},
        **{outcome: images["pool-val", outcome] + images["pool", outcome] for outcome in OUTCOMES},
        "reference_with_a_copy": len(set(copies["match_id"].to_pylist())),
        "reference_copies": images["val-val", "copy"],
        "reference_unverifiable": images["val", "unverifiable"],
        "overrides": len(set(audit["id"].filter(pc.is_valid(audit["override"])).to_pylist())),
        "going": len(set(of_pool["id"].filter(pc.invert(of_pool["kept"])).to_pylist())),
    }


def _told(summary: Mapping[str, Any], audit: pa.Table, args: argparse.Namespace) -> str:
    lines = [
        f"{summary['candidates']:,} candidates ({args.candidates}) against {summary['reference']:,} images of {args.reference}",
        *(f"{summary[outcome]:>9,}  {what}" for outcome, what in OUTCOMES.items()),
        f"{summary['reference_with_a_copy']:>9,}  reference images have a copy among the candidates",
    ]
    if summary["reference_copies"]:
        lines.append(f"{summary['reference_copies']:>9,}  reference images are copies of another reference image")
    if summary["reference_unverifiable"]:
        lines.append(f"{summary['reference_unverifiable']:>9,}  reference images have too few features to be found")
    for name, reasons in summary["refused"].items():
        lines += [f"{n:>9,}  of {name} not checked: {reason}" for reason, n in reasons.items()]
    if summary["overrides"]:
        lines.append(f"{summary['overrides']:>9,}  decided by hand")
    going = audit.filter(pc.and_(pc.starts_with(audit["relation"], "pool"), pc.invert(audit["kept"])))
    rows = going.select(["id", "match_id", "rule"]).slice(0, SHOWN).to_pylist()
    lines += [f"  {row['id']}" + (f" shows {row['match_id']}" if row["match_id"] else "") + f" ({row['rule']})" for row in rows]
    if len(going) > SHOWN:
        lines.append(f"  ... and {len(going) - SHOWN:,} more")
    lines.append(f"{summary['going']:,} candidates leak." if summary["going"] else "No candidate leaks.")
    if args.out is not None:
        lines.append(f"Look at {args.out / GALLERY}; every finding is in {args.out / findings.FILE}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
