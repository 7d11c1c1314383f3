"""Manifests: the same rows are the same bytes, and every image is the one that was indexed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.sources.source import LISTED
from pipeline.store import artifact, manifest
from pipeline.store.manifest import Manifest, ManifestError
from tests.tiny import folder_of, jpeg, tar_of


def rows(names: list[str], label: int | None = None, **columns: list) -> pa.Table:
    n = len(names)
    values = {
        "id": names,
        "path": [f"p/{name[0]}.tar" for name in names],
        "offset": list(range(n)),
        "size": [10] * n,
        "width": [32] * n,
        "height": [32] * n,
        "crc32": [2**32 - 1] * n,
        "label": [label] * n,
    }
    return pa.Table.from_pydict(values | columns, schema=manifest.SCHEMA)


def written(folder: Path, table: pa.Table, classes: tuple[str, ...] = ()) -> Manifest:
    with artifact.writing(folder) as tmp:
        manifest.write(tmp, table, classes)
    return manifest.read(folder)


def test_what_is_read_is_what_was_written(tmp_path):
    table = rows(["a/1", "a/2", "b/1"], label=1)
    got = written(tmp_path / "m", table, ("cat", "dog"))
    assert got.table.equals(table)
    assert got.table.schema == manifest.SCHEMA
    assert got.classes == ("cat", "dog")
    assert got.labels().tolist() == [1, 1, 1]
    assert len(got) == 3


def test_the_bytes_depend_on_the_rows_alone(tmp_path):
    names = [f"{c}/{i:03}" for c in "abc" for i in range(50)]
    table = rows(names)
    written(tmp_path / "whole", table)
    order = np.random.default_rng(0).permutation(len(names))
    parts = [table.take(order[i::7]) for i in range(7)]  # chunks, each with a dictionary of its own
    written(tmp_path / "shuffled", pa.concat_tables([*parts, table.slice(0, 0)]))
    wide = rows([*names, "z/1"]).slice(0, len(names))  # a dictionary with a value that no row uses
    written(tmp_path / "sliced", wide)
    files = [(tmp_path / name / manifest.FILE).read_bytes() for name in ("whole", "shuffled", "sliced")]
    assert files[0] == files[1] == files[2]


def test_the_bytes_do_not_depend_on_chunks_in_memory(tmp_path):
    """Arrow ends a Parquet page where a chunk ends, once the page is large enough."""
    table = rows([f"{i:08}/a/somewhat/longer/name.jpg" for i in range(60_000)])
    written(tmp_path / "whole", table)
    written(tmp_path / "chunks", pa.concat_tables([table.slice(at, 700) for at in range(0, len(table), 700)]))
    assert (tmp_path / "whole" / manifest.FILE).read_bytes() == (tmp_path / "chunks" / manifest.FILE).read_bytes()


def test_rows_are_sorted_by_the_bytes_of_their_ids(tmp_path):
    got = written(tmp_path / "m", rows(["b", "a/10", "a/9", "ä", "B"]))
    assert got.table["id"].to_pylist() == sorted(["b", "a/10", "a/9", "ä", "B"], key=str.encode)


def test_an_id_that_occurs_twice(tmp_path):
    for names in (["a", "b", "a"], ["a", "a", "b"]):
        with pytest.raises(ManifestError, match="the image id a occurs twice"):
            written(tmp_path / "m", rows(names))
    assert not (tmp_path / "m").exists()


def test_an_empty_manifest(tmp_path):
    got = written(tmp_path / "m", manifest.SCHEMA.empty_table(), ("cat",))
    assert len(got) == 0
    assert got.classes == ("cat",)
    assert list(manifest.image_bytes(got, [])) == []


def test_labels_are_needed_where_they_are_asked_for(tmp_path):
    got = written(tmp_path / "m", rows(["a", "b"]).set_column(7, manifest.SCHEMA.field(7), pa.array([0, None], pa.int32())))
    with pytest.raises(ManifestError, match="1 of 2 images have no label"):
        got.labels()


def test_take_keeps_the_order_of_rows(tmp_path):
    got = written(tmp_path / "m", rows(list("abcdef"), label=0), ("cat",)).take(np.array([4, 1, 3]))
    assert got.table["id"].to_pylist() == ["b", "d", "e"]
    assert got.classes == ("cat",)


def test_concat(tmp_path):
    labelled = written(tmp_path / "a", rows(["b", "d"], label=0), ("cat",))
    pool = written(tmp_path / "b", rows(["a", "c"]))
    both = manifest.concat([pool, labelled])
    assert both.table["id"].to_pylist() == ["a", "b", "c", "d"]
    assert both.table["label"].to_pylist() == [None, 0, None, 0]
    assert both.classes == ("cat",)
    with pytest.raises(ManifestError, match="the image b is in two of the sets"):
        manifest.concat([labelled, labelled.take(np.array([0])), pool])


def indexed(tmp_path: Path) -> Manifest:
    """Two images in files of their own, three in a tar."""
    loose = {f"{i}.jpg": jpeg(i) for i in range(2)}
    folder_of(tmp_path / "loose", loose)
    packed = {f"{i}.jpg": jpeg(i) for i in range(2, 5)}
    tar = tar_of(tmp_path / "a.tar", packed).read_bytes()
    data = [*loose.values(), *packed.values()]
    return written(
        tmp_path / "m",
        rows(
            [f"x/{i}" for i in range(5)],
            path=[str(tmp_path / "loose" / name) for name in loose] + [str(tmp_path / "a.tar")] * 3,
            offset=[0, 0] + [tar.index(image) for image in packed.values()],
            size=[len(image) for image in data],
            crc32=[manifest.zlib.crc32(image) for image in data],
        ),
    )


def test_the_bytes_come_in_the_order_asked_for(tmp_path):
    images = indexed(tmp_path)
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 1, 1, 2], []):
        assert list(manifest.image_bytes(images, order)) == [jpeg(i) for i in order]
    assert list(manifest.image_bytes(images, np.array([3]))) == [jpeg(3)]


def test_an_altered_image_is_named(tmp_path):
    images = indexed(tmp_path)
    other = bytearray(jpeg(0))
    other[len(other) // 2] ^= 1
    (tmp_path / "loose" / "0.jpg").write_bytes(other)
    with pytest.raises(ManifestError, match=r"loose/0\.jpg: the image x/0 is not the one that `prepare` indexed"):
        list(manifest.image_bytes(images, [1, 0]))


def test_a_file_that_was_cut_is_named(tmp_path):
    images = indexed(tmp_path)
    tar = tmp_path / "a.tar"
    size = images.table["offset"][4].as_py() + 100
    tar.write_bytes(tar.read_bytes()[:size])
    assert len(list(manifest.image_bytes(images, [2, 3]))) == 2
    with pytest.raises(ManifestError, match=r"a\.tar: the image x/4 is not the one .* \(100 of \d+ bytes read\)"):
        list(manifest.image_bytes(images, [4]))


def test_a_file_that_is_gone_is_named(tmp_path):
    images = indexed(tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ManifestError, match=r"a\.tar cannot be opened \(No such file or directory\)"):
        list(manifest.image_bytes(images, [2]))


def test_a_folder_that_is_no_manifest(tmp_path):
    with artifact.writing(tmp_path / "model") as tmp:
        (tmp / "model.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"model has no manifest\.parquet"):
        manifest.read(tmp_path / "model")


def labelled(counts: dict[str, int]) -> Manifest:
    """So many images of each class, sorted by id, classes in the order given."""
    tables = [rows([f"{name}/{i:03}" for i in range(n)], label) for label, (name, n) in enumerate(counts.items())]
    return Manifest(pa.concat_tables(tables).sort_by("id").cast(manifest.SCHEMA), tuple(counts))


def ids(images: Manifest) -> set[str]:
    return set(images.table["id"].to_pylist())


@pytest.mark.parametrize(
    ("amount", "expected"), [(7, {0: 7, 1: 7}), (0.1, {0: 10, 1: 4}), (0.001, {0: 1, 1: 1}), (1.0, {0: 100, 1: 40})]
)
def test_a_balanced_subset_has_a_number_or_a_share_of_each_class(amount, expected):
    drawn = manifest.balanced(labelled({"b": 100, "a": 40}), amount, seed=0)
    assert dict(enumerate(np.bincount(drawn.labels()))) == expected
    assert drawn.table["id"].to_pylist() == sorted(ids(drawn))


def test_balanced_subsets_are_nested_and_drawn_by_the_seed_class_by_class():
    images = labelled({"a": 40, "b": 40})
    assert ids(manifest.balanced(images, 5, 0)) < ids(manifest.balanced(images, 0.5, 0))
    assert ids(manifest.balanced(images, 5, 0)) != ids(manifest.balanced(images, 5, 1))
    more = manifest.balanced(labelled({"a": 40, "b": 40, "c": 10}), 5, 0)
    assert ids(manifest.balanced(images, 5, 0)) < ids(more)


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ManifestError, match="asks for 20 images of the class b, which has 10"):
        manifest.balanced(labelled({"a": 40, "b": 10}), 20, 0)


def test_what_was_read_is_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "GROUP", 2)
    names = [f"{i:02}" for i in range(9)]
    images = written(tmp_path / "m", rows(names))
    assert manifest.pq.ParquetFile(tmp_path / "m" / manifest.FILE).num_row_groups == 5
    assert {column.num_chunks for column in images.table.columns} == {1}
    assert images.table.equals(rows(names))


def loose(n: int) -> pa.Table:
    """Rows of images that are files of their own."""
    return rows([f"{i:08}.jpg" for i in range(n)], path=[f"/data/pool/{i:08}.jpg" for i in range(n)])


def test_a_manifest_of_loose_files_grows_in_proportion(tmp_path, monkeypatch):
    """Each row group once held the paths of all: 5 M files were 735 MB."""
    monkeypatch.setattr(manifest, "GROUP", 256)
    sizes = []
    for n in (1024, 4096):
        written(tmp_path / str(n), loose(n))
        sizes.append((tmp_path / str(n) / manifest.FILE).stat().st_size)
    assert sizes[1] < 4.4 * sizes[0]


def old(folder: Path, table: pa.Table) -> Path:
    """A manifest as versions before wrote it: ids of 32-bit offsets, paths as a dictionary."""
    before = {"id": pa.string(), "path": pa.dictionary(pa.int32(), pa.string())}
    schema = pa.schema([(field.name, before.get(field.name, field.type)) for field in manifest.SCHEMA])
    with artifact.writing(folder) as tmp:
        stored = table.cast(schema).replace_schema_metadata({"classes": '["cat"]'})
        manifest.pq.write_table(stored, tmp / manifest.FILE, compression="zstd", row_group_size=4)
    return folder


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    table = rows([f"{c}/{i}" for c in "ab" for i in range(5)], 0)
    images = manifest.read(old(tmp_path / "old", table))
    assert images.table.equals(table)
    assert images.table.schema == manifest.SCHEMA
    assert images.classes == ("cat",)
    assert pa.concat_tables(manifest.groups(tmp_path / "old")).equals(table.cast(manifest.STORED))


def test_a_writer_of_parts_writes_what_the_whole_is(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "GROUP", 16)
    table = rows([f"{i:03}" for i in range(70)], 0)
    written(tmp_path / "whole", table, ("cat",))
    for step in (1, 7, 16, 50):
        with artifact.writing(tmp_path / str(step)) as tmp, manifest.Writer(tmp, ("cat",)) as writer:
            for first in range(0, len(table), step):
                writer.add(table.slice(first, step))
        assert (tmp_path / str(step) / manifest.FILE).read_bytes() == (tmp_path / "whole" / manifest.FILE).read_bytes()
    assert manifest.count(tmp_path / "whole") == 70


def test_the_text_of_all_ids_may_be_more_than_2_gib(tmp_path):
    """Offsets of 32 bits end there: `take` and `sort_by` said `offset overflow`."""
    for field in (manifest.SCHEMA.field("id").type, manifest.SCHEMA.field("path").type.value_type):
        assert pa.types.is_large_string(field)
    assert pa.types.is_large_string(LISTED.field("id").type)


def test_an_image_of_both_sets_is_learned_once_from_where_the_chosen_set_has_it(tmp_path):
    train = written(tmp_path / "train", rows(["a1", "a2"], 0, path=["large.tar"] * 2), ("ant",))
    written(tmp_path / "pool", rows(["b1", "b2", "b3"]))
    packed = {"path": ["small.tar"] * 3}
    written(tmp_path / "all", rows(["a1", "a2", "b1"], 0, **packed), ("ant",))
    written(tmp_path / "some", rows(["a2", "b1", "b2"], 0, **packed), ("ant",))

    def learned(chosen, labelled=True):
        seen, known, unlabelled = manifest.to_learn(tmp_path / chosen, tmp_path / "train", labelled)
        assert known.table.equals(train.table)
        return dict(zip(seen.table["id"].to_pylist(), seen.table["path"].to_pylist(), strict=True)), unlabelled

    assert learned("train") == ({"a1": "large.tar", "a2": "large.tar"}, 0)
    assert learned("all") == ({"a1": "small.tar", "a2": "small.tar", "b1": "small.tar"}, 1)
    assert learned("some") == ({"a1": "large.tar", "a2": "small.tar", "b1": "small.tar", "b2": "small.tar"}, 2)
    assert learned("some", labelled=False)[0].keys() == {"a2", "b1", "b2"}
    assert learned("pool")[1] == 3
    assert len(learned("pool", labelled=False)[0]) == 3
