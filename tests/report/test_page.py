import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from contrast.core.registry import InputError
from contrast.experiment.folder import CONFIG, RESULTS, SAMPLES, RunFolder
from contrast.experiment.record import read_record, write_report
from contrast.report import RunRecord, render

FINDINGS = ["finding-1", "finding-2", "finding-3"]
SECTIONS = {
    "image": ["results", "training", *FINDINGS, "views", "map", "neighbours", "run", "glossary"],
    "series": ["results", "training", "views", "map", "neighbours", "run", "glossary"],
}


class Outline(HTMLParser):
    """Headings, ids, links and pictures of a page; unclosed elements are an error."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.ids, self.links, self.sources, self.open, self.missing_alt = [], [], [], [], [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in found:
            self.ids.append(found["id"])
        self.links += [found[key] for key in ("href", "xlink:href") if key in found]
        self.sources += [found["src"]] if "src" in found else []
        self.missing_alt += tag == "img" and not found.get("alt")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(params=["image", "series"])
def kind(request):
    return request.param


@pytest.fixture
def page(kind, pages):
    return pages[kind]


def copied(folder, tmp_path, *without):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("report.html", *without))
    return copy


def section_ids(text):
    return re.findall(r'<section id="([\w-]+)"', text)


def text_of(folder, **options):
    return write_report(RunFolder(folder), **options).read_text(encoding="utf-8")


def test_a_finished_run_has_every_section_on_a_small_page(page, kind):
    assert page.name == "report.html"
    assert page.stat().st_size < 3_000_000
    text = page.read_text(encoding="utf-8")
    assert section_ids(text) == SECTIONS[kind]
    assert "contrast pretrain simclr" in text


def test_the_page_is_well_formed_html(page):
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.missing_alt == 0
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)


def test_nothing_is_loaded_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert all(link.startswith("#") for link in outline.links)
    assert all(source.startswith("data:image/") for source in outline.sources)
    assert not re.search(r"https?:|//\w|@import|<script|<link", re.sub(r"base64,[\w+/=]+", "", text))


def test_every_picture_can_be_decoded(page, kind):
    sources = Outline(page.read_text(encoding="utf-8")).sources
    assert len(sources) == 1 + 6 * 6 + (2 if kind == "image" else 0)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).load()


def test_names_of_users_are_text_and_never_markup(pages):
    text = pages["series"].read_text(encoding="utf-8")
    assert "<b>run</b>" not in text
    assert "&lt;b&gt;run&lt;/b&gt;" in text


def test_every_linked_word_is_explained_once(page):
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r'class="word" href="#(word-[\w-]+)"', text)
    assert len(linked) == len(set(linked))
    assert {"word-k-nn", "word-linear-probe", "word-spread", "word-standard-error", "word-t-sne"} <= set(linked)
    assert re.findall(r'<div id="(word-[\w-]+)"><dt>', text) == sorted({*linked, "word-temperature", "word-batch-size"})


def test_without_samples_no_picture_and_no_name_is_left(page, kind):
    with np.load(page.parent / "report.npz") as content:
        names = [str(name) for name in content["x_name"]] + ["x_train[3]", "x_train[5]"] * (kind == "image")
    whole = page.read_text(encoding="utf-8")
    assert all(name in whole for name in names)
    text = render(read_record(RunFolder(page.parent)), samples=False)
    assert "data:image/" not in text.split("<body>")[1]
    assert "<img" not in text
    assert "Noisy samples" not in text
    assert not any(name in text for name in names)
    assert section_ids(text) == [name for name in SECTIONS[kind] if name not in ("views", "neighbours", "finding-3")]


def test_the_same_folder_gives_the_same_page(pages):
    assert render(read_record(RunFolder(pages["series"].parent))) == pages["series"].read_text(encoding="utf-8")


def test_data_without_labels_have_a_page_without_results(image_folder, tmp_path):
    folder = copied(image_folder, tmp_path, "results.json", "report.npz")
    text = text_of(folder)
    assert "There are no results" in text
    assert "699 steps" in text
    assert '<section id="results"' not in text
    assert '<section id="training"' in text


def test_a_run_that_has_only_a_config_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("version: 1\nname: mine\ndata: {source: digits}\n")
    text = text_of(tmp_path)
    assert "No training step" in text
    assert "mine · digits" in text


def test_findings_are_items_curves_and_tables(pages):
    text = pages["image"].read_text(encoding="utf-8")
    course, items, table = (text.split(f'<section id="{name}"')[1].split("</section>")[0] for name in FINDINGS)
    assert "Samples flagged by epoch" in course
    assert re.findall(r'aria-label="Samples flagged by epoch: (\w+) over', course) == ["noisy", "applied"]
    assert "<table" not in course and "<img" not in course
    assert re.findall(r"<li>.*?mean loss <b>([\d.]+)</b>.*?>(x_train\[\d\])</span>", items) == [
        ("0.25", "x_train[3]"), ("0.5", "x_train[5]"),
    ]  # fmt: skip
    assert items.count("<img") == 2
    assert re.findall(r"<td>(.*?)</td>", table) == ["0", "1,200", "0.75", "1", "237", "0.5"]
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == ["cluster", "size", "purity"]


def test_an_item_of_the_findings_without_a_picture_has_its_name():
    findings = {"title": [{"sample": 7, "name": "a.png", "epoch": 2, "loss": 1.0}, {"sample": 8}]}
    text = render(RunRecord("a", results={"findings": findings}))
    assert "a.png" in text and "sample 8" in text
    assert "<img" not in text and "<svg" not in text


def test_findings_that_cannot_be_drawn_are_a_table(tmp_path):
    drawn = [{"epoch": epoch, "share": share} for epoch, share in enumerate((1e299, -1e299, 0.5, None, 1e308))]
    odd = [{"epoch": epoch, "share": 0.25} for epoch in ("first", None, 1e308, 10**400, float("nan"), "\ud800")]
    findings = {"mixed": [*drawn, *odd], "large": [{"epoch": 1e299, "share": 10**400}, {"epoch": 1e299, "share": 1}]}
    (tmp_path / CONFIG).write_text("name: mine\n")
    (tmp_path / RESULTS).write_text(json.dumps({"findings": findings}))
    text = text_of(tmp_path)
    mixed, large = (text.split(f'<section id="finding-{number}"')[1].split("</section>")[0] for number in (1, 2))
    assert mixed.count("<svg") == large.count("<svg") == 1
    assert mixed.count("<td>0.25</td>") == len(odd)
    assert large.count("<td>") == 2


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            {"state": "stopped", "step": 1400},
            "stopped at step 1,400 and saved. To continue: contrast resume digits-simclr-001",
        ),
        ({"state": "failed", "step": 3, "why": "Memory is full."}, "failed at step 3. Memory is full."),
        ({"state": "running", "step": 3, "heartbeat": 0}, "not finished at step 3"),
    ],
)
def test_the_page_of_an_unfinished_run_has_a_note(image_folder, tmp_path, state, said):
    folder = copied(image_folder, tmp_path, "report.npz")
    assert 'role="note"' not in text_of(folder)
    (folder / "state.json").write_text(json.dumps(state))
    assert said in text_of(folder)


@pytest.mark.parametrize(("value", "said"), [(1.0, "has collapsed"), (np.nan, "NaN or infinite features")])
def test_a_broken_encoder_is_named(image_folder, tmp_path, value, said):
    folder = copied(image_folder, tmp_path)
    with np.load(folder / "report.npz") as content:
        arrays = dict(content)
    arrays["features"] = np.full_like(arrays["features"], value)
    np.savez(folder / "report.npz", **arrays)
    text = text_of(folder)
    assert said in text
    assert '<section id="map"' not in text


def test_warnings_of_the_evaluation_are_shown(image_folder, tmp_path):
    folder = copied(image_folder, tmp_path, "report.npz")
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"warnings": ["no labelled test item for: cat."]}))
    assert "No labelled test item for: cat." in text_of(folder)


def test_the_reason_of_a_failure_is_left_out_with_the_samples(image_folder, tmp_path):
    folder = copied(image_folder, tmp_path, "report.npz")
    (folder / "state.json").write_text(json.dumps({"state": "failed", "step": 3, "why": "patient_7.png is truncated."}))
    assert "patient_7.png" in text_of(folder)
    assert "patient_7.png" not in text_of(folder, samples=False)


def test_a_loss_that_is_not_finite_is_named(image_folder, tmp_path):
    folder = copied(image_folder, tmp_path, "report.npz")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    assert "from step 2 on" in text_of(folder)


def test_a_large_picture_of_views_is_reduced(image_folder, tmp_path):
    folder = copied(image_folder, tmp_path, "report.npz")
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "views.png")
    assert (folder / "views.png").stat().st_size > 6_000_000
    assert len(text_of(folder)) < 3_000_000


@pytest.mark.parametrize("name", [RESULTS, SAMPLES, CONFIG])
def test_a_damaged_file_is_named(image_folder, tmp_path, name):
    folder = copied(image_folder, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b": {" if name == CONFIG else content[:-100])
    with pytest.raises(InputError, match=f"{name} should be .*, but cannot be read: .* Restore or remove it"):
        write_report(RunFolder(folder))
    assert not (folder / "report.html").exists()
