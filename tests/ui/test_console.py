"""The console in a real browser on one real server: every operation of a user, by role and label."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.prefix_proxy import proxied
from tests.support.running import RunningServer, eventually
from tests.support.tiny import tiny_adapter
from tests.ui.browser import Console, chromium

KEY = "sk-console"
ORDERS = Path(__file__).parent.parent.parent / "docs/demo/orders"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def begun(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("server")
    server = RunningServer(model_dir, root, root / "data", "--api-key", KEY)
    server.begin()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def adapters(begun: RunningServer, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters created while the server starts."""
    root = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter(root / str(seed), model_dir, seed=seed, r=2) for seed in range(2)]


@pytest.fixture(scope="module")
def server(begun: RunningServer, adapters: list[Path]) -> RunningServer:
    begun.wait_ready()
    for name, directory in (("poet", adapters[0]), ("poet", adapters[1]), ("legal", adapters[0])):
        parts = {part: (directory / file).read_bytes() for part, file in FILES.items()}
        upload = httpx.post(
            f"{begun.url}/v1/adapters", data={"name": name}, files=parts, headers=AUTHORIZED, timeout=60
        )
        assert upload.status_code == 201, upload.text
    return begun


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def console(browser: Browser, server: RunningServer) -> Iterator[Console]:
    """A console that is logged in."""
    console = Console(browser, server.url, permissions=["clipboard-read", "clipboard-write"])
    console.context.add_init_script(f"sessionStorage.setItem('lorakeet-key', '{KEY}')")
    yield console
    console.close()


def small(path: Path, lines: int, tmp_path: Path) -> Path:
    """The first lines of a shipped data file."""
    target = tmp_path / path.name
    target.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]), encoding="utf-8")
    return target


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Browser, server: RunningServer) -> None:
    console = Console(browser, server.url)
    console.expected = ["401"]
    page = console.page
    page.goto(f"{server.url}/")
    page.get_by_label("Key", exact=True).fill("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("API key")
    expect(page.get_by_role("dialog").locator(".refusal")).to_be_visible()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("row", name=re.compile("poet"))).to_be_visible()
    page.reload()
    expect(page.get_by_role("row", name=re.compile("poet"))).to_be_visible()
    other = console.context.new_page()
    other.goto(console.root)
    expect(other.get_by_role("dialog")).to_be_visible()
    console.close()


def test_upload_with_its_receipt_and_a_refusal_as_it_is(console: Console, adapters: list[Path], tmp_path: Path) -> None:
    page = console.open("adapters")
    page.get_by_role("button", name="Upload").click()
    form = page.get_by_role("form", name="Upload an adapter")
    form.get_by_label("Name", exact=True).fill("fresh/one")
    broken = tmp_path / "adapter_config.json"
    broken.write_text(json.dumps({"peft_type": "LORA", "r": "many"}))
    console.expected = ["400"]
    form.get_by_label("Files").set_input_files([broken, adapters[0] / FILES["weights"]])
    form.get_by_role("button", name="Upload").click()
    expect(form.get_by_role("alert")).to_contain_text("r")
    form.get_by_label("Files").set_input_files([adapters[0] / file for file in FILES.values()])
    form.get_by_role("button", name="Upload").click()
    expect(form.get_by_role("status")).to_contain_text("Received: fresh/one")
    expect(page.get_by_role("row", name=re.compile("fresh.one"))).to_contain_text("LoRA")
    detail = page.get_by_role("complementary", name="Adapter")
    expect(detail.get_by_role("heading", name="fresh/one")).to_be_visible()
    detail.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("row", name=re.compile("fresh.one"))).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("row", name=re.compile("fresh.one"))).to_be_visible()


def test_search_and_sort_ask_the_server(console: Console) -> None:
    page = console.open("adapters")
    page.get_by_role("searchbox").fill("LEG")
    expect(page.get_by_role("row", name=re.compile("poet"))).to_have_count(0)
    expect(page.get_by_role("row", name=re.compile("legal"))).to_be_visible()
    page.get_by_role("searchbox").fill("nobody")
    expect(page.get_by_text("No adapter is called so")).to_be_visible()
    page.get_by_role("searchbox").fill("")
    page.get_by_role("button", name="Requests").click()
    expect(page.get_by_role("columnheader", name="Requests")).to_have_attribute("aria-sort", "descending")


def test_promote_split_and_roll_back(console: Console, server: RunningServer) -> None:
    page = console.open("adapters/poet")
    detail = page.get_by_role("complementary", name="Adapter")

    def current() -> str:
        return detail.get_by_role("row").filter(has_text="current").locator("code").inner_text()

    expect(detail.get_by_role("button", name="Roll back")).to_be_visible()
    before = current()
    detail.get_by_role("button", name=re.compile("Promote")).click()
    expect(detail.get_by_role("row").filter(has_text="current")).not_to_contain_text(before)
    detail.get_by_role("button", name="Roll back").click()
    expect(detail.get_by_role("row").filter(has_text="current")).to_contain_text(before)
    detail.get_by_role("slider").nth(0).fill("75")
    detail.get_by_role("slider").nth(1).fill("25")
    detail.get_by_role("button", name="Split by these shares").click()
    expect(detail.get_by_role("slider").nth(1)).to_have_value("25")
    split = httpx.get(f"{server.url}/v1/adapters/poet/versions", headers=AUTHORIZED).json()["split"]
    assert sorted(split.values()) == [0.25, 0.75]
    detail.get_by_role("button", name="Roll back").click()
    expect(detail.get_by_text("current")).to_be_visible()
    detail.get_by_role("button", name="Pin").click()
    expect(detail.get_by_role("button", name="Unpin")).to_be_visible()
    detail.get_by_role("button", name="Unpin").click()
    expect(detail.get_by_role("button", name="Pin", exact=True)).to_be_visible()


def test_two_adapters_are_compared(console: Console) -> None:
    page = console.open("playground?m=poet&m=legal&max_tokens=12&temperature=0")
    page.get_by_label("show probabilities").check()
    page.get_by_role("textbox", name="Prompt", exact=True).fill("The quick brown fox")
    page.keyboard.press("Enter")
    answers = [page.get_by_role("region", name=f"Answers of {name}") for name in ("poet", "legal")]
    for answer in answers:
        expect(answer).to_contain_text("12 tokens")
        expect(answer).to_contain_text("tokens/s")
        expect(answer).to_contain_text("first token")
    digests = {answer.locator("code.digest").get_attribute("title") for answer in answers}
    assert len(digests) == 2
    tokens = answers[0].get_by_role("group")
    tokens.focus()
    page.keyboard.press("ArrowRight")
    expect(answers[0].get_by_role("status")).to_contain_text("%")
    page.get_by_role("button", name="Copy as Python").click()
    program = page.evaluate("navigator.clipboard.readText()")
    compile(program, "copied.py", "exec")
    assert '"poet"' in program
    page.get_by_role("button", name="Share").click()
    expect(page.get_by_text("Copied.").first).to_be_visible()
    shared = page.evaluate("navigator.clipboard.readText()")
    assert "m=poet&m=legal" in shared
    page.reload()
    expect(answers[1]).to_contain_text("12 tokens")


STEPS = "(document.querySelector('.job .plot path')?.getAttribute('d').match(/[ML]/g) || []).length"


def curve(page: Page, more_than: int) -> int:
    """The number of steps in the chart of the loss, once there are more than this."""
    eventually(lambda: page.evaluate(STEPS) > more_than, 30, f"more than {more_than} steps in the chart")
    return int(page.evaluate(STEPS))


def test_a_fine_tune_from_its_data_to_the_playground(console: Console, tmp_path: Path) -> None:
    page = console.open("finetune")
    page.get_by_role("button", name="New fine-tune", exact=True).click()
    form = page.get_by_role("form", name="New fine-tune")
    form.get_by_label("Upload training data").set_input_files(small(ORDERS / "train.jsonl", 48, tmp_path))
    form.get_by_text("A look at what is trained on").click()
    expect(form.locator("mark").filter(has_text="<|im_end|>").first).to_be_visible()
    form.get_by_label("Upload validation data").set_input_files(small(ORDERS / "held_out.jsonl", 6, tmp_path))
    form.get_by_label("Name", exact=True).fill("orders")
    form.get_by_label("Epochs").fill("40")
    form.get_by_label("Rank r").fill("4")
    expect(form.get_by_text("Optimiser")).to_be_visible()
    form.get_by_role("button", name="Start").click()

    expect(page.get_by_text("This run's configuration")).to_be_visible()
    seen = curve(page, more_than=curve(page, more_than=0) + 3)
    page.reload()
    curve(page, more_than=seen - 1)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".job .badge").first).to_have_text("paused")
    held = int(page.evaluate(STEPS))
    page.get_by_role("button", name="Resume").click()
    curve(page, more_than=held)
    page.locator(".job").get_by_role("link", name="Try it").first.click()
    expect(page.get_by_label("Model or adapter").nth(1)).to_have_value(re.compile("ft:tiny:orders:.*ckpt-step"))
    page.go_back()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".job .badge").first).to_have_text("cancelled")


def test_an_evaluation_shows_where_answers_differ(console: Console, tmp_path: Path) -> None:
    page = console.open("evaluations")
    page.get_by_role("button", name="New evaluation", exact=True).click()
    form = page.get_by_role("form", name="New evaluation")
    form.get_by_label("Adapter").fill("legal")
    form.get_by_label("Upload examples").set_input_files(small(ORDERS / "held_out.jsonl", 3, tmp_path))
    expect(form.get_by_text("Duplicates")).to_be_visible()
    form.get_by_role("button", name="Measure").click()
    page.get_by_role("link", name="legal").first.click()
    expect(page.get_by_text("3 of 3 answers differ")).to_be_visible()
    expect(page.get_by_role("article").first).to_contain_text("Expected")


VIEWS = ("adapters/poet", "playground?m=poet", "finetune", "evaluations", "server")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_views_are_accessible_and_fit_every_width(browser: Browser, server: RunningServer, scheme: str) -> None:
    console = Console(browser, server.url, color_scheme=scheme)
    console.context.add_init_script(f"sessionStorage.setItem('lorakeet-key', '{KEY}')")
    for view in VIEWS:
        page = console.open(view)
        for name in ("Upload", "New fine-tune", "New evaluation"):
            if (button := page.get_by_role("button", name=name, exact=True)).count():
                button.click()
        page.wait_for_load_state("networkidle")
        assert console.violations() == [], view
        for width in (360, 1280, 2560):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (view, width)
        page.set_viewport_size({"width": 1280, "height": 800})
    console.close()


def test_the_server_view_has_the_last_hour(console: Console) -> None:
    page = console.open("server")
    expect(page.get_by_role("img", name=re.compile("^Tokens per second: generated"))).to_be_visible()
    expect(page.get_by_text("Engine restarts", exact=True)).to_be_visible()


def test_the_console_works_under_a_prefix(browser: Browser, server: RunningServer) -> None:
    with proxied(server.url, "/behind/proxy") as url:
        console = Console(browser, url, "/behind/proxy")
        console.context.add_init_script(f"sessionStorage.setItem('lorakeet-key', '{KEY}')")
        asked: list[str] = []
        console.context.on("request", lambda request: asked.append(request.url))
        expect(console.open("adapters").get_by_role("row", name=re.compile("poet"))).to_be_visible()
        page = console.open("playground?m=poet&max_tokens=4")
        page.get_by_role("textbox", name="Prompt", exact=True).fill("Hi")
        page.keyboard.press("Enter")
        expect(page.get_by_text(re.compile("4 tokens"))).to_be_visible()
        for view in ("finetune", "evaluations", "server"):
            console.open(view).wait_for_load_state("networkidle")
        assert [one for one in asked if not one.startswith(f"{url}/behind/proxy/")] == []
        console.close()


DROP = """async ([target, files]) => {
  const moved = new DataTransfer();
  for (const [name, bytes] of files) moved.items.add(new File([new Uint8Array(bytes)], name));
  for (const kind of ["dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(kind, {dataTransfer: moved, bubbles: true, cancelable: true}));
  }
}"""


def test_files_are_dropped_and_a_deletion_is_carried_out(
    console: Console, server: RunningServer, adapters: list[Path]
) -> None:
    page = console.open("adapters")
    page.get_by_role("searchbox").wait_for()
    files = [[name, list((adapters[0] / name).read_bytes())] for name in FILES.values()]
    page.evaluate(DROP, [page.get_by_role("heading", level=1).element_handle(), [*files, ["README.md", [35]]]])
    form = page.get_by_role("form", name="Upload an adapter")
    expect(form).to_contain_text("left out: README.md")
    form.get_by_label("Name", exact=True).fill("dropped")
    form.get_by_role("button", name="Upload").click()
    expect(form.get_by_role("status")).to_contain_text("Received: dropped")
    page.get_by_role("complementary", name="Adapter").get_by_role("button", name="Delete").click()
    assert httpx.get(f"{server.url}/v1/adapters/dropped", headers=AUTHORIZED).status_code == 200
    page.get_by_role("button", name="Do it now").click()
    eventually(
        lambda: httpx.get(f"{server.url}/v1/adapters/dropped", headers=AUTHORIZED).status_code == 404, 8, "its deletion"
    )


def test_adapters_are_mixed_and_one_is_merged(console: Console, server: RunningServer) -> None:
    page = console.open("adapters")
    page.get_by_role("button", name="Mix").click()
    form = page.get_by_role("form", name="Mix adapters")
    form.get_by_label("Name of the mix").fill("both")
    for index, (name, weight) in enumerate((("poet", "0.75"), ("nobody", "0.25"))):
        form.get_by_label("Adapter", exact=True).nth(index).fill(name)
        form.get_by_label("Weight", exact=True).nth(index).fill(weight)
    console.expected = ["404"]
    form.get_by_role("button", name="Mix").click()
    expect(form.get_by_role("alert")).to_contain_text("nobody", timeout=60_000)
    form.get_by_label("Adapter", exact=True).nth(1).fill("legal")
    with page.expect_request(lambda request: request.method == "POST") as sent:
        form.get_by_role("button", name="Mix").click()
    weights = [{"adapter": "poet", "weight": 0.75}, {"adapter": "legal", "weight": 0.25}]
    assert json.loads(sent.value.post_data or "")["mix"] == weights
    expect(form.get_by_role("status")).to_contain_text("Received: both", timeout=60_000)
    detail = page.get_by_role("complementary", name="Adapter")
    expect(detail.get_by_role("heading", name="both")).to_be_visible()
    detail.get_by_role("button", name="Merge, nf4").click()
    expect(detail.get_by_role("button", name="Undo the merge")).to_be_visible(timeout=60_000)
    expect(detail).to_contain_text("KL")
    expect(detail).to_contain_text("tokens/s")
    detail.get_by_role("button", name="Undo the merge").click()
    expect(detail.get_by_role("button", name="Merge, nf4")).to_be_visible()
