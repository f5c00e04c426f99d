"""GGUF files of a run, answered by a real llama.cpp.

llama.cpp's converters are scripts of its repository. Where REMORA_LLAMA_CPP names that, they run;
otherwise a script that writes as they do takes their place.

Also covers remora.export.gguf, remora.export.llama_cpp and remora.export.llama_cpp_client.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import exporting
import forked
from conftest import WAYS
from exporting import contents, refused, remora
from remora.config import TrainConfig
from remora.errors import ModelError
from remora.evaluation import results
from remora.export import gguf, llama_cpp, llama_cpp_client
from remora.export.llama_cpp_client import Client
from remora.models import saved
from remora.training.run import train

original, place = exporting.original, exporting.place

CONVERTER = """
import os, sys
if os.environ.get("BROKEN") == "architecture":
    sys.exit("ERROR:hf-to-gguf:Model MambaForCausalLM is not supported")
if os.environ.get("BROKEN") == "disk":
    sys.exit("OSError: [Errno 28] No space left on device")
sys.path.insert(0, {tests!r})
from pathlib import Path
import gguf, gguf_files
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, (_, path, _, kind) = sys.argv[1], sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(folder).float()
tokenizer = AutoTokenizer.from_pretrained(folder)
more = {{"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0}}
if os.environ.get("BROKEN") == "token":
    more["tokenizer.ggml.add_bos_token"] = True
if os.environ.get("BROKEN") == "template":
    more["tokenizer.chat_template"] = tokenizer.chat_template.replace("Classify", "Sort")
kind = getattr(gguf.GGMLQuantizationType, kind.upper())
gguf_files.write(Path(path), model, tokenizer, kind, metadata=more)
"""


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's source, or a folder with what stands in for it."""
    if "REMORA_LLAMA_CPP" in os.environ:
        return Path(os.environ["REMORA_LLAMA_CPP"])
    folder = tmp_path_factory.mktemp("llama.cpp")
    tests = str(Path(__file__).parents[1])
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(tests=tests))
    return folder


STAND_IN = pytest.mark.skipif("REMORA_LLAMA_CPP" in os.environ, reason="breaks the stand-in")


def forks_converter(patch: pytest.MonkeyPatch) -> None:
    """Let a fork, whose libraries are imported, run the stand-in for the converter."""

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        _, option, code, *arguments = command
        assert option == "-c"
        program = f"import sys; sys.argv = {['-c', *arguments]!r}\n{code}"
        with tempfile.TemporaryFile("w+") as written:
            ended = forked.start(program, written, **env).wait()
            written.seek(0)
            return SimpleNamespace(returncode=ended, stderr=written.read())

    if "REMORA_LLAMA_CPP" not in os.environ:
        patch.setattr(gguf, "subprocess", SimpleNamespace(run=run))


def test_llama_cpp_gives_the_adapters_labels(place: Path, source: Path, capsys) -> None:
    assert remora("run", "--gguf", "f16", "--llama-cpp", source, "--json") == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert f"run-f16.gguf: 0 of {told['num_rows']} rows get another label" in shown.err
    folder = place / "run" / "gguf"
    assert told["directory"] == str(folder)
    (file,) = told["files"]
    assert file["name"] == "run-f16.gguf"
    assert file["num_bytes"] == (folder / "run-f16.gguf").stat().st_size
    assert (file["num_differing"], file["accuracy"]) == (0, told["adapter_accuracy"])
    assert told["num_rows"] == len(results.read(Path("run")).texts)
    written = {"Modelfile", "README.md", "client.py", "labels.gbnf", "labels.json", file["name"]}
    assert {path.name for path in folder.iterdir()} == written
    assert "run-f16.gguf --jinja --port" in (folder / "README.md").read_text()


@pytest.fixture(scope="session")
def exported(original: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / "out"
    arguments = [original / "run", "--gguf", "f32", "--llama-cpp", source, "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        forks_converter(patch)
        assert remora(*arguments) == 0
    return output


def test_the_exported_client_answers_alone(exported: Path, original: Path) -> None:
    """As a user runs it: a plain Python, the files of the folder, a server."""
    run = results.read(original / "run")
    prompt = saved.open_trained(original / "run", device="cpu").prompt
    model = llama_cpp.Model(path=exported / "run-f32.gguf", context=prompt.max_length, threads=1)
    with llama_cpp.LlamaCpp(model) as engine:
        command = [sys.executable, "-I", exported / "client.py", engine._url, *run.texts]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == run.predicted


SPLIT = {"größe": "card", "überweisung": "refund", "日本語 🎉": "top up"}
"""Labels with tokens that end within a character, and the words of their messages."""


def test_labels_whose_characters_are_split_into_tokens(
    base: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp leaves probabilities out where the token that it writes is part of a character."""
    forks_converter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    ways = [f"{way} {i}" for i in range(8) for way in WAYS]
    rows = [(way.format(word), label) for label, word in SPLIT.items() for way in ways]
    lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
    Path("data.jsonl").write_text("\n".join(lines))
    common = {"model": str(base), "name": "run", "output": tmp_path, "baselines": "none"}
    common |= {"precision": "float32", "device": "cpu"}
    size = {"method": "full", "learning_rate": 7e-3, "max_steps": 100, "batch_size": 8}
    train(TrainConfig("data.jsonl", **common, **size))
    assert remora("run", "--gguf", "f32", "--llama-cpp", source, "--differing", "0") == 0

    run, prompt = results.read(Path("run")), saved.open_trained("run", device="cpu").prompt
    assert {*run.predicted} == {*SPLIT}
    path = Path("run/gguf/run-f32.gguf").absolute()
    with llama_cpp.LlamaCpp(llama_cpp.Model(path=path, context=200, threads=1)) as engine:
        command = [sys.executable, "-I", "-X", "utf8", "run/gguf/client.py", engine._url]
        done = subprocess.run([*command, *run.texts], capture_output=True, check=True)
        assert done.stdout.decode().split("\n")[:-1] == run.predicted
        # Other labels, where the model's own answer begins with a part of a character
        ids = [*prompt.tokenizer.encode("card"), prompt.answers[0][-1]]
        client = Client(engine._url, {"card": ids})
        for message in run.texts:
            assert client.labels(client.prompt_ids(message)) == ("card", "card")


def test_an_answer_without_probabilities_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama_cpp.LlamaCpp(llama_cpp.Model(path=Path("a.gguf"), context=64, threads=1))
    engine._url = "http://127.0.0.1:8080"
    told = {"/apply-template": b'{"prompt": "a"}', "/tokenize": b'{"tokens": [1]}'}
    monkeypatch.setattr(
        llama_cpp_client.urllib.request,
        "urlopen",
        lambda request: io.BytesIO(told.get(request.selector, b'{"content": ""}')),
    )
    wanted = (
        r"llama.cpp cannot use a.gguf \(the server's answer to /completion has no "
        r"completion_probabilities\); pip install -U xllamacpp, or use --merge"
    )
    with pytest.raises(ModelError, match=wanted):
        list(engine.answers(["a"], {"b": [2, 3]}))


def test_the_grammar_and_the_modelfile_hold_any_label_and_prompt(exported: Path) -> None:
    hostile = ['say "no"', "a\\b", "two\nlines", "ünï {{ x }}"]
    rule = llama_cpp.grammar(hostile).removeprefix("root ::= ").strip()
    assert [json.loads(each) for each in rule.split(" | ")] == hostile
    text = (exported / "Modelfile").read_text()
    assert text.startswith("FROM ./run-f32.gguf\nTEMPLATE ")
    assert "Classify the message.\n\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


@STAND_IN
@pytest.mark.parametrize(
    ("broken", "code", "wanted"),
    [
        ("template", 4, "llama.cpp reads another prompt from run-f16.gguf"),
        ("token", 4, "llama.cpp reads another prompt from run-f16.gguf"),
        ("architecture", 4, "cannot write this model ('ERROR:hf-to-gguf:Model MambaForCausalLM"),
        ("disk", 5, "no space left for the GGUF file; choose another --output"),
    ],
)
def test_what_answers_otherwise_is_not_written(
    place: Path,
    source: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    code: int,
    wanted: str,
) -> None:
    forks_converter(monkeypatch)
    monkeypatch.setenv("BROKEN", broken)
    before = contents(place)
    assert remora("run", "--gguf", "f16", "--llama-cpp", source) == code
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert wanted in line
    assert contents(place) == before


@STAND_IN
def test_an_adapter_left_out_is_noticed(
    place: Path, source: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmerged(config: Any, dtype: Any, folder: Path) -> Any:
        for path in Path("base").iterdir():
            shutil.copy(path, folder)
        return saved.open_trained("run", device="cpu").prompt

    forks_converter(monkeypatch)
    monkeypatch.setattr(gguf, "write_merged", unmerged)
    assert remora("run", "--gguf", "f16", "--llama-cpp", source) == 4
    assert "gives another label than the adapter to" in capsys.readouterr().err
    assert not Path("run/gguf").exists()


REFUSED = {
    "no converter": (["--gguf", "f16"], 2, "run git clone --depth 1 https://github.com/ggml-org"),
    "another folder": (["--gguf", "f16", "--llama-cpp", "base"], 2, "base has no convert_hf_to"),
    "no adapter's converter": (["--gguf-lora", "--llama-cpp", "base"], 2, "no convert_lora_to"),
    "no llama-quantize": (
        ["--gguf", "q4_k_m", "--llama-cpp", "source"],
        2,
        "q4_k_m needs llama-quantize, which is neither in source/build/bin nor on the PATH",
    ),
    "an unknown type": (["--gguf", "q9", "--llama-cpp", "base"], 2, "gguf has 'q9'; give some of"),
    "two ways": (["--gguf", "f16", "--merge"], 2, "merge and gguf are given together"),
    "its settings alone": (["--merge", "--llama-cpp", "base"], 2, "add --gguf or --gguf-lora"),
    "a type twice over": (["--gguf", "f16", "--dtype", "float32"], 2, "name their types"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_said_before_anything_is_computed(
    place: Path, capsys, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Path("source").mkdir()
    Path("source/convert_hf_to_gguf.py").touch()
    monkeypatch.setenv("PATH", str(place))
    arguments, code, wanted = REFUSED[name]
    refused(place, capsys, code, wanted, "run", *arguments)


@pytest.mark.parametrize("missing", ["xllamacpp", "sentencepiece"])
def test_without_the_extra_it_says_what_to_install(
    place: Path, source: Path, capsys, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = gguf.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == missing else real(name, *a)
    )
    wanted = "run pip install 'remora[llama-cpp]'"
    refused(place, capsys, 2, wanted, "run", "--gguf", "f16", "--llama-cpp", source)


def test_the_converter_finds_its_modules_beside_its_script() -> None:
    """Also by a path of Windows, which has backslashes."""
    for library, script in (("posixpath", "/a b/llama.cpp/c.py"), ("ntpath", r"C:\llama.cpp\c.py")):
        code = (
            f"import os, runpy, {library}\nos.path = {library}\n"
            f"runpy.run_path = lambda *_, **__: print(*sys.path[:2], sep='|')\n{gguf._CONVERT}"
        )
        command = [sys.executable, "-I", "-S", "-c", code, script, ""]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        folder = script.removesuffix("c.py")
        assert done.stdout.strip() == f"{folder[:-1]}|{folder}gguf-py"


def test_a_process_that_ends_is_one_line(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    model = llama_cpp.Model(path=broken, context=64, threads=1)
    with (
        pytest.raises(ModelError, match=r"llama.cpp cannot use broken.gguf .*pip install -U"),
        llama_cpp.LlamaCpp(model),
    ):
        pass


@pytest.mark.skipif("REMORA_LLAMA_CPP" not in os.environ, reason="needs llama.cpp's converter")
def test_the_adapter_alone_answers_as_merged(place: Path, source: Path, capsys) -> None:
    assert remora("run", "--gguf-lora", "--llama-cpp", source, "--json") == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["num_differing"] == 0
    assert Path("run/gguf-lora/chat_template.jinja").is_file()
