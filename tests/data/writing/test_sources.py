"""What is found in sources as labs have them: class folders, ImageNet's archives, Kinetics, captions."""

import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ul_scale.data.indexing import build_index
from ul_scale.data.writing.source_files import list_source, read_entry
from ul_scale.data.writing.sources import Source, SourceOptions, find_source

from ..conftest import tar_bytes, write_shards

SYNSETS = ("n01440764", "n01443537", "n02110185")


def fill(root: Path, *names: str) -> Path:
    """Write files whose content is their name: nothing here decodes them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def find(source: Path | str, **options) -> Source:
    return find_source(str(source), SourceOptions(**options))


def labels(source: Source) -> dict[str, int | None]:
    return {sample.key: sample.label for sample in source.samples}


def refused(source: Path | str, **options) -> str:
    with pytest.raises(ValueError) as caught:
        find(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_csv(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # as spreadsheets write it
    return str(path)


# Class folders


def test_the_top_folder_is_the_class(tmp_path: Path) -> None:
    names = ("cat/1.jpg", "cat/indoors/2.PNG", "dog/1.jpeg", "dog/notes.md", ".git/x.jpg")
    (fill(tmp_path, *names) / "eel").mkdir()
    source = find(tmp_path)
    assert labels(source) == {"cat/1": 0, "cat/indoors/2": 0, "dog/1": 1}
    assert source.classes == ["cat", "dog", "eel"] and source.others == ["dog/notes.md"]
    assert (
        source.describe() == f"{tmp_path}: 3 images; 3 classes; 1 other files left out, such as dog/notes.md"
    )


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/dog/3.jpg")
    assert "holds the splits train, val; choose one with --split" in refused(tmp_path)
    (tmp_path / "train" / "ape").mkdir()
    train = find(tmp_path, split="train")
    assert labels(train) == {"cat/1": 1, "dog/2": 2} and train.classes == ["ape", "cat", "dog"]
    assert "has no split 'test', only train, val" in refused(tmp_path, split="test")
    assert "--split train is given, but there are no folders" in refused(tmp_path / "train", split="train")
    fill(tmp_path, "bus/4.jpg")
    assert "train, val" in refused(tmp_path)
    fill(tmp_path / "vehicles", "bus/4.jpg", "train/5.jpg")  # beside a bus it is a thing
    assert find(tmp_path / "vehicles").classes == ["bus", "train"]


@pytest.mark.parametrize("splits", [("train2017", "val2017"), ("data/train", "data/val")])
def test_splits_are_not_mixed_whatever_they_are_called(tmp_path: Path, splits: tuple[str, str]) -> None:
    fill(tmp_path, f"{splits[0]}/cat/1.jpg", f"{splits[1]}/cat/2.jpg")
    assert "split" in refused(tmp_path)


def test_classes_of_the_training_set_are_taken_over(tmp_path: Path) -> None:
    fill(tmp_path / "val", "dog/1.jpg")
    write_shards(str(tmp_path / "shards"), [3])
    shards = str(tmp_path / "shards")
    build_index(shards)
    assert "its shards name no classes" in refused(tmp_path / "val", classes_from=shards)
    build_index(shards, classes=["cat", "dog"])
    source = find(tmp_path / "val", classes_from=shards)
    assert labels(source) == {"dog/1": 1} and source.classes == ["cat", "dog"]
    fill(tmp_path / "val", "eel/1.jpg")
    assert f"the class 'eel' is not among the 2 of {shards}" in refused(tmp_path / "val", classes_from=shards)


def test_images_and_videos_are_told_apart(tmp_path: Path) -> None:
    fill(tmp_path, "run/1.mp4", "run/1.jpg", "sit/2.webm")
    assert "holds images and videos; choose with --kind" in refused(tmp_path)
    assert labels(find(tmp_path, kind="videos")) == {"run/1": 0, "sit/2": 1}
    assert labels(find(tmp_path, kind="images")) == {"run/1": 0}
    assert "no videos found; expected <class>/<file>{.mp4,.webm" in refused(
        fill(tmp_path / "x", "a/1.png"), kind="videos"
    )
    with pytest.raises(ValueError, match="kind 'audio'; expected one of auto, images, videos"):
        SourceOptions(kind="audio")


def test_dots_in_names_do_not_cut_the_key(tmp_path: Path) -> None:
    assert list(labels(find(fill(tmp_path, "st.bernard/a.b.png")))) == ["st.bernard/a_b"]


@pytest.mark.parametrize("names", [("a/1.png", "a/1.jpg"), ("a/1.x.png", "a/1_x.png")])
def test_two_files_of_one_key_are_named(tmp_path: Path, names: tuple[str, str]) -> None:
    one, two = sorted(names)
    assert f"{one} and {two} would both be the sample a/1" in refused(fill(tmp_path, *names))


@pytest.mark.parametrize("name", ["a/new\nline.jpg", "a/back\\slash.jpg", b"a/caf\xe9.jpg"])
def test_names_that_a_shard_cannot_hold(tmp_path: Path, name: str | bytes) -> None:
    name = os.fsdecode(name)
    assert "has a name that a shard cannot hold; rename it" in refused(fill(tmp_path, name))


# ImageNet


def imagenet_train(**extra: bytes) -> dict[str, bytes]:
    return {
        f"{synset}.tar": tar_bytes({f"{synset}_{n}.JPEG": f"{synset}/{n}".encode() for n in (7, 10)} | extra)
        for synset in SYNSETS
    }


@pytest.fixture
def val_names() -> list[str]:
    return [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 7)]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_an_archive_of_class_archives_is_read_where_it_is(
    tmp_path: Path, memory_url: str, where: str
) -> None:
    url = f"{tmp_path if where == 'local' else memory_url}/ILSVRC2012_img_train.tar"
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(fs._parent(path), exist_ok=True)
    fs.pipe_file(path, tar_bytes(imagenet_train()))
    source = find(url)
    assert source.classes == list(SYNSETS) and len(source.samples) == 6
    for sample in source.samples:
        synset, name = sample.key.split("/")
        assert read_entry(source.fs, sample.entry) == f"{synset}/{name.split('_')[1]}".encode()
        assert sample.label == SYNSETS.index(synset) and name.startswith(synset)


def test_a_folder_of_class_archives(tmp_path: Path) -> None:
    for name, content in imagenet_train().items():
        (tmp_path / name).write_bytes(content)
    source = find(tmp_path)
    assert source.classes == list(SYNSETS)
    assert {read_entry(source.fs, sample.entry).decode() for sample in source.samples} == {
        f"{synset}/{n}" for synset in SYNSETS for n in (7, 10)
    }


def test_a_tar_of_class_folders_in_folders(tmp_path: Path) -> None:
    names = ["./set/train/cat/1.jpg", "./set/train/dog/2.jpg", "./set/val/cat/3.jpg"]
    (tmp_path / "set.tar").write_bytes(tar_bytes({name: name.encode() for name in names}))
    assert "holds the splits train, val" in refused(tmp_path / "set.tar")
    assert labels(find(tmp_path / "set.tar", split="val")) == {"cat/3": 0}
    (tmp_path / "one.tar").write_bytes(tar_bytes({name: b"" for name in names[:2]}))
    assert labels(find(tmp_path / "one.tar")) == {"cat/1": 0, "dog/2": 1}


def test_validation_labels_by_the_devkit(tmp_path: Path, val_names: list[str]) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    np = pytest.importorskip("numpy")
    (tmp_path / "val.tar").write_bytes(tar_bytes({name: b"" for name in reversed(val_names)}))
    truth = write_csv(tmp_path / "ILSVRC2012_validation_ground_truth.txt", *"213132")
    assert "meta.mat, which is not beside it" in refused(tmp_path / "val.tar", labels=truth)
    order = [SYNSETS[2], SYNSETS[0], SYNSETS[1]]  # the devkit's ids are not sorted by synset
    rows = [(number, synset, "words") for number, synset in enumerate(order, 1)]
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, kind)})
    source = find(tmp_path / "val.tar", labels=truth)
    assert source.classes == list(SYNSETS)
    assert [labels(source)[name[:-5]] for name in val_names] == [0, 2, 1, 2, 1, 0]


def test_validation_labels_by_a_table_agree_with_training(tmp_path: Path, val_names: list[str]) -> None:
    fill(tmp_path / "val", *val_names)
    rows = [f"{val_names[n][:-5]},{SYNSETS[n % 3]} 1 2 3 4" for n in (3, 1, 0, 2, 5, 4)]
    table = write_csv(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString", *rows)
    source = find(tmp_path / "val", labels=table)
    assert source.classes == list(SYNSETS)
    assert [labels(source)[name[:-5]] for name in val_names] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("ids", [True, False])
def test_validation_labels_by_a_list(tmp_path: Path, val_names: list[str], named: bool, ids: bool) -> None:
    fill(tmp_path / "val", *val_names)
    values = [number % 3 for number in range(6)]
    words = [str(value) if ids else SYNSETS[value] for value in values]
    lines = [f"{name} {word}" if named else word for name, word in zip(val_names, words)]
    source = find(tmp_path / "val", labels=write_csv(tmp_path / "val.txt", *lines))
    assert [labels(source)[name[:-5]] for name in val_names] == values
    assert source.classes == (None if ids else list(SYNSETS))
    short = write_csv(tmp_path / "short.txt", *lines[:-1])
    if not named:
        assert "has 5 labels for 6 files; expected one each" in refused(tmp_path / "val", labels=short)


def test_flat_images_need_a_word_on_labels(tmp_path: Path, val_names: list[str]) -> None:
    fill(tmp_path, *val_names)
    assert f"{val_names[0]} is in no class folder" in refused(tmp_path)
    assert set(labels(find(tmp_path, labels="none")).values()) == {None}


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../evil.JPEG", "has an absolute path, '..'"),
        ("/evil.JPEG", "has an absolute path, '..'"),
        ("evil.pkl", "holds pickled content"),
        ("deeper.tar", "is an archive of archives; give it on its own as the source"),
        ("0.cls", "is a shard, not a class; index existing shards with: ul-scale data index URL"),
    ],
)
def test_archives_that_are_refused(tmp_path: Path, member: str, message: str) -> None:
    (tmp_path / "train.tar").write_bytes(tar_bytes(imagenet_train(**{member: b""})))
    assert message in refused(tmp_path / "train.tar")


def test_links_and_cut_archives_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        link = tarfile.TarInfo("a.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    whole = imagenet_train()
    (tmp_path / "link.tar").write_bytes(tar_bytes(whole | {f"{SYNSETS[1]}.tar": stream.getvalue()}))
    assert f"{SYNSETS[1]}.tar: member 'a.JPEG' is a link" in refused(tmp_path / "link.tar")
    (tmp_path / "inner.tar").write_bytes(
        tar_bytes(whole | {f"{SYNSETS[0]}.tar": whole[f"{SYNSETS[0]}.tar"][:600]})
    )
    assert f"{SYNSETS[0]}.tar: " in refused(tmp_path / "inner.tar")  # its end is not the outer's next header
    (tmp_path / "cut.tar").write_bytes(tar_bytes(whole)[:-20000])
    assert "cut.tar" in refused(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("set.zip", "is compressed; unpack it"),
        ("set.tar.gz", "is compressed; unpack it"),
        ("set.bin", "is a file; expected a folder or a .tar"),
        ("pipe:cat set.tar", "data is never read from a program"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, monkeypatch, name: str, message: str) -> None:
    monkeypatch.chdir(fill(tmp_path, "set.zip", "set.tar.gz", "set.bin"))
    assert message in refused(name)


# Kinetics

KINETICS = "label,youtube_id,time_start,time_end,split"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Clips as they are downloaded: of two splits in one folder, and one that is gone from the web."""
    names = ("-a_b_000001_000011.mp4", "cc_000020_000030.mp4", "dd_000000_000010.mp4", "other.mp4")
    return fill(tmp_path / "clips", *names)


def test_kinetics_splits_are_not_mixed(tmp_path: Path, clips: Path) -> None:
    rows = ["ski,-a_b,1,11,train", "eat,cc,20.0,30.0,val", "run,dd,0,10,train", "ski,gone,5,15,train"]
    table = write_csv(tmp_path / "kinetics.csv", KINETICS, *rows)
    assert "holds the splits train, val; choose one with --split" in refused(clips, labels=table)
    assert "has no split 'test', only train, val" in refused(clips, labels=table, split="test")
    train = find(clips, labels=table, split="train")
    assert labels(train) == {"-a_b_000001_000011": 2, "dd_000000_000010": 1}
    assert train.missing == ["gone_000005_000015"]
    assert set(train.others) == {"cc_000020_000030.mp4", "other.mp4"}
    assert "1 of the table missing, such as gone_000005_000015" in train.describe()
    val = find(clips, labels=table, split="val")
    assert labels(val) == {"cc_000020_000030": 0} and val.classes == train.classes == ["eat", "run", "ski"]


def test_a_video_in_two_splits_is_refused(tmp_path: Path, clips: Path) -> None:
    rows = ["eat,cc,20,30,train", "ski,-a_b,1,11,train", "eat,cc,50,60,val"]
    table = write_csv(tmp_path / "kinetics.csv", KINETICS, *rows)
    assert "cc is in both train and val; expected one split" in refused(clips, labels=table, split="train")


def test_a_table_of_another_set_is_refused(tmp_path: Path, clips: Path) -> None:
    rows = [f"ski,{name},1,11,train" for name in ("-a_b", "x", "y")]
    table = write_csv(tmp_path / "kinetics.csv", KINETICS, *rows)
    assert "2 files of the table are missing, such as x_000001_000011, and 1 are there" in refused(
        clips, labels=table
    )


def test_paths_and_labels_of_any_kind(tmp_path: Path) -> None:
    fill(tmp_path / "v", "a/1.mp4", "b/1.mp4", "b/2.webm")
    table = write_csv(tmp_path / "all.csv", "path,class", "./a/1.mp4,3", "b/2.webm,0", "b/1,3")
    source = find(tmp_path / "v", labels=table)
    assert labels(source) == {"a/1": 3, "b/1": 3, "b/2": 0} and source.classes is None
    assert "3 videos; class ids 0 to 3" in source.describe()
    table = write_csv(tmp_path / "all.csv", "path,class", "1.mp4,3", "a/1.mp4,3")
    assert "'1.mp4' is the name of several files; expected their paths" in refused(
        tmp_path / "v", labels=table
    )
    table = write_csv(tmp_path / "all.csv", "path,class", "2,3", "b/2.webm,4")
    assert "b/2.webm has the labels '3' and '4'" in refused(tmp_path / "v", labels=table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clip,label\na,b\n", "no column for the file; it has clip, label, expected one of path, file"),
        ("path,what\na,b\n", "no column for the label; it has path, what, expected one of label, class"),
        ("path,label\ndd_000000_000010\n", "line 2 does not have the 2 columns of the first"),
        ("path,label\ndd_000000_000010,\n", 'a row has no label: {"path": "dd_000000_000010"'),
        ("path,label\n,x\n", "row 1 has no path"),
        ("path,label\n", "has no rows"),
        ("path,label\nd\xe9,x\n", "is not UTF-8 text"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, clips: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    assert message in refused(clips, labels=str(tmp_path / "t.csv"))
    assert "x.csv: no such file" in refused(clips, labels=str(tmp_path / "x.csv"))
    assert "expected a table that ends in .csv" in refused(clips, labels=str(tmp_path / "t.xls"))


# Captions


def test_captions_beside_the_images(tmp_path: Path) -> None:
    fill(tmp_path, "000/1.jpg", "000/1.txt", "001/2.webp", "readme.txt")
    source = find(tmp_path)
    assert labels(source) == {"000/1": None, "001/2": None}  # folders of captioned images are no classes
    assert [sample.sidecar and sample.sidecar.name for sample in source.samples] == ["000/1.txt", None]
    assert source.has_sidecars and source.others == ["readme.txt"]
    assert labels(find(tmp_path, labels="folders")) == {"000/1": 0, "001/2": 1}
    without = find(tmp_path, captions="none")
    assert labels(without) == {"000/1": 0, "001/2": 1} and not without.has_sidecars


CAPTIONS = {"1.jpg": ["a fox\u2028jumps, “high”"], "2.jpg": ["eins", "zwei"]}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "jsonl-lists", "parquet"])
def test_captions_in_a_table(tmp_path: Path, form: str) -> None:
    fill(tmp_path / "i", "1.jpg", "2.jpg", "3.jpg")
    rows = [(name, text) for name, texts in CAPTIONS.items() for text in texts] + [("gone.jpg", "x")]
    table = tmp_path / f"t.{form.split('-')[0]}"
    if form in ("csv", "tsv"):
        lines = [("\t" if form == "tsv" else ",").join((name, f'"{text}"')) for name, text in rows]
        write_csv(table, "\t".join(("file_name", "text")) if form == "tsv" else "file_name,text", *lines)
    elif form == "jsonl":
        lines = [json.dumps({"image": name, "caption": text}, ensure_ascii=False) for name, text in rows]
        table.write_text("\n".join(lines))
    elif form == "jsonl-lists":
        lines = [json.dumps({"image": name, "captions": texts}) for name, texts in CAPTIONS.items()]
        table.write_text("\n\n".join([*lines, '{"image": "gone.jpg", "captions": ["x"]}']))
    else:
        pq.write_table(pa.table({"Path": [r[0] for r in rows], "Caption": [r[1] for r in rows]}), table)
    source = find(tmp_path / "i", captions=str(table))
    assert {sample.entry.name: list(sample.captions) for sample in source.samples} == CAPTIONS
    assert source.missing == ["gone.jpg"] and source.others == ["3.jpg"]
    assert set(labels(source).values()) == {None}


def test_captions_in_columns_of_other_names(tmp_path: Path) -> None:
    fill(tmp_path / "i", "1.jpg")
    table = write_csv(tmp_path / "t.csv", "image,emoji,title", "nothing,1,fox")
    options = {"captions": table, "image_column": "emoji", "caption_column": "title"}
    assert find(tmp_path / "i", **options).samples[0].captions == ("fox",)
    assert "no column for the caption; it has image, emoji, title, expected words" in refused(
        tmp_path / "i", **options | {"caption_column": "words"}
    )


def test_captions_and_labels(tmp_path: Path) -> None:
    fill(tmp_path / "i", "1.jpg", "2.jpg")
    captions = write_csv(tmp_path / "c.csv", "image,caption", "1,fox", "2,hen")
    classes = write_csv(tmp_path / "l.csv", "image,label", "1,b", "2,a")
    source = find(tmp_path / "i", captions=captions, labels=classes)
    assert [(sample.label, sample.captions) for sample in source.samples] == [(1, ("fox",)), (0, ("hen",))]


@pytest.mark.parametrize(
    "row", ['{"image": "1.jpg"}', '{"image": "1.jpg", "caption": " "}', '{"image": "1.jpg", "caption": [3]}']
)
def test_captions_that_are_no_text(tmp_path: Path, row: str) -> None:
    fill(tmp_path / "i", "1.jpg")
    (tmp_path / "t.jsonl").write_text('{"image": "1.jpg", "caption": "x"}\n' + row)
    assert "the caption of 1.jpg is " in refused(tmp_path / "i", captions=str(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl").write_text("[1]")
    assert "line 1 is not a JSON object" in refused(tmp_path / "i", captions=str(tmp_path / "t.jsonl"))


def test_hidden_files_and_names_in_archives(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"./cat/._1.jpg": b"", "./cat/1.jpg": b"1", ".DS_Store": b""}))
    assert [entry.name for entry in list_source(str(tmp_path / "a.tar")).entries] == ["cat/1.jpg"]
