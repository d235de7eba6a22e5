"""dev.py and what it is made of: a failure that has a remedy is one clear line, and nothing is left half done."""

import ast
import os
import re
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from devtools import browser, environment, install, workflow
from devtools.errors import DevError, DiskFullError
from devtools.lock import file_lock
from devtools.pip import NotOfferedError, Pip
from devtools.progress import NodeProgress, bar
from devtools.server import link_pack, require_free
from devtools.status import StatusLine


ROOT = Path(__file__).resolve().parent.parent
DEV = ROOT / "dev.py"


def run_dev(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    known = {name: value for name, value in os.environ.items() if not name.startswith("COMFYUI_")}
    return subprocess.run(
        [sys.executable, str(DEV), *arguments],
        capture_output=True, text=True, timeout=120, env=known | variables,
    )  # fmt: skip


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def fake_comfyui(tmp_path: Path) -> Path:
    """A folder that looks like a ComfyUI from outside: enough to be chosen, not to be run."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "cli_args.py").write_text("")
    (folder / "main.py").write_text("")
    return folder


# ── the command line ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 9)])
def test_an_old_python_is_told_what_to_do(version):
    code = f"import sys, runpy; sys.version_info = {(*version, 1, 'final', 0)}; sys.argv = ['dev.py', 'test']; "
    code += f"runpy.run_path({str(DEV)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert_one_line(done, f"Python {version[0]}.{version[1]} ", "3.10 or newer")


def test_dev_py_can_be_read_by_old_pythons():
    """The message above must be reached: no syntax and no character that an old Python stumbles over."""
    source = DEV.read_text(encoding="ascii")
    tree = ast.parse(source, feature_version=(3, 4))
    assert not any(isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr) for node in ast.walk(tree))


def test_without_a_command_the_usage_is_shown():
    done = run_dev()
    assert done.returncode == 2
    assert "usage: dev.py" in done.stderr
    for name in ("demo", "test", "serve", "exec", "bench", "lint"):
        assert name in run_dev("--help").stdout


def test_the_development_commands_need_only_the_standard_library():
    """What dev.py imports before there is an environment."""
    for name in ("commands", "environment", "install", "pip", "lock", "status", "errors", "browser"):
        for node in ast.walk(ast.parse((ROOT / "devtools" / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in sys.stdlib_module_names


def test_a_wrong_comfyui_path_is_named(tmp_path: Path):
    assert_one_line(run_dev("exec", "x.py", COMFYUI_PATH=str(tmp_path)), f"COMFYUI_PATH={tmp_path}", "main.py")


def test_a_wrong_comfyui_python_is_named(fake_comfyui: Path):
    done = run_dev("exec", "x.py", COMFYUI_PATH=str(fake_comfyui), COMFYUI_PYTHON="/no/such/python")
    assert_one_line(done, "COMFYUI_PYTHON=/no/such/python", "does not exist")


def test_a_missing_file_is_named(fake_comfyui: Path):
    done = run_dev("exec", "no-such.py", COMFYUI_PATH=str(fake_comfyui), COMFYUI_PYTHON=sys.executable)
    assert_one_line(done, "no-such.py")


def test_a_missing_benchmark_is_named(fake_comfyui: Path):
    done = run_dev("bench", "no-such", COMFYUI_PATH=str(fake_comfyui), COMFYUI_PYTHON=sys.executable)
    assert_one_line(done, "no-such")


def test_a_python_without_the_tools_is_told_what_to_install(fake_comfyui: Path, tmp_path: Path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = next(path for path in (tmp_path / "bare").glob("*/python*") if path.stem == "python")
    done = run_dev("test", COMFYUI_PATH=str(fake_comfyui), COMFYUI_PYTHON=str(python))
    assert_one_line(done, str(python), "-m pip install", "pytest")


@pytest.mark.host
def test_exec_runs_a_file_with_the_pack_and_comfyui_importable(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, tidetable, folder_paths\n"
        "from tidetable.schedules import shift\n"
        "from devtools import client\n"
        "print(sys.argv[1:], os.path.dirname(folder_paths.__file__) == os.environ['COMFYUI_PATH'])\n"
        "sys.exit(7)\n"
    )
    host = {"COMFYUI_PATH": os.path.realpath(os.environ["COMFYUI_PATH"]), "COMFYUI_PYTHON": sys.executable}
    done = run_dev("exec", str(script), "-x", "--keep", "--", "word", **host)
    assert done.stdout.strip() == "['-x', '--keep', '--', 'word'] True", done.stderr
    assert done.returncode == 7


@pytest.mark.host
def test_a_port_in_use_is_named():
    host = {"COMFYUI_PATH": os.environ["COMFYUI_PATH"], "COMFYUI_PYTHON": sys.executable}
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert_one_line(run_dev("serve", "--port", str(port), **host), f"Port {port}", "--port")


@pytest.mark.host
def test_a_full_disk_is_one_line(tmp_path: Path):
    """/dev/full answers every write as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    host = {"COMFYUI_PATH": os.environ["COMFYUI_PATH"], "COMFYUI_PYTHON": sys.executable}
    script = tmp_path / "script.py"
    script.write_text("with open('/dev/full', 'w') as file:\n    file.write('x' * 100000)\n")
    done = run_dev("exec", str(script), **host)
    assert "error: The disk is full" in done.stderr
    assert "Traceback" not in done.stderr


# ── which environment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("typed", ["dev.py", "{pack}/dev.py"])
def test_a_comfyui_with_a_link_to_the_checkout_is_found(fake_comfyui: Path, tmp_path: Path, monkeypatch, typed):
    pack = fake_comfyui / "custom_nodes" / "ComfyUI-Tidetable"
    pack.parent.mkdir()
    pack.symlink_to(ROOT, target_is_directory=True)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setenv("PWD", str(pack if typed == "dev.py" else tmp_path))
    monkeypatch.setattr(sys, "argv", [typed.format(pack=pack), "test"])
    found = environment.find()
    assert found is not None
    assert (found.comfyui, found.python, found.managed) == (fake_comfyui, Path(sys.executable), False)


def test_the_own_environment_of_a_comfyui_is_preferred(fake_comfyui: Path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    python = fake_comfyui / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert environment.python_of(fake_comfyui) == python


# ── building one ───────────────────────────────────────────────────────────────────────────────────


def test_the_development_packages_are_the_ones_in_pyproject():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(project["optional-dependencies"]["dev"]) == sorted(install.DEVELOPMENT)
    assert project["dependencies"] == []


def test_too_little_disk_is_found_before_anything_is_fetched(tmp_path: Path):
    install.require_disk(tmp_path, needed=1)
    with pytest.raises(DevError, match=r"needs 1000000000\.0 GB and only .* GB are free"):
        install.require_disk(tmp_path, needed=10**18)


def test_requirement_names():
    names = {"torchvision", "torch", "comfyui-frontend-package==1.32.9", "Some_Thing[extra]>=1; python_version>'3'"}
    assert {install._name(name) for name in names} == {
        "torchvision", "torch", "comfyui-frontend-package", "some-thing",
    }  # fmt: skip


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "precious").write_text("")
    with pytest.raises(DevError, match="was not made by dev.py"):
        install.ensure(tmp_path, StatusLine())
    assert (tmp_path / ".venv" / "precious").exists()


def test_a_finished_environment_is_used_as_it_is(tmp_path: Path):
    """No lock, no process, no network: only the records are read."""
    make_finished_environment(tmp_path)
    found = install.ensure(tmp_path)
    assert (found.comfyui, found.python) == (tmp_path / ".comfyui", tmp_path / ".venv" / "bin" / "python")
    assert not (tmp_path / ".dev").exists()


def make_finished_environment(root: Path) -> None:
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").write_text("")
    (root / ".comfyui").mkdir()
    install._write_record(root / ".comfyui", install._comfyui_record())
    steps = [install.TORCH, install.TORCHVISION, f"requirements {install._recipe()}"]
    install._write_record(root / ".venv", {"done": steps})


def test_a_killed_step_is_not_taken_for_done(tmp_path: Path):
    make_finished_environment(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        install._step(tmp_path / ".venv", "another step", raise_keyboard_interrupt)
    assert not install._is_ready(tmp_path)


def raise_keyboard_interrupt():
    raise KeyboardInterrupt


def test_a_failed_step_is_tried_again_and_the_others_are_not(tmp_path: Path):
    install._write_record(tmp_path, {"done": []})
    ran = []

    def fail():
        raise DevError("no network")

    install._step(tmp_path, "first", lambda: ran.append("first"))
    with pytest.raises(DevError):
        install._step(tmp_path, "second", fail)
    install._step(tmp_path, "first", lambda: ran.append("first again"))
    install._step(tmp_path, "second", lambda: ran.append("second"))
    assert ran == ["first", "second"]
    assert install._read_record(tmp_path) == {"done": ["first", "second"]}


@pytest.fixture
def pip(tmp_path: Path) -> Pip:
    """The pip of this Python (it installs nowhere: the tests below only let it fail) and an empty index."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this Python has no pip")
    (tmp_path / "index").mkdir()
    pip = Pip(Path(sys.executable), tmp_path / "setup.log", tmp_path / "tmp", StatusLine())
    pip.variables = {name: value for name, value in pip.variables.items() if not name.startswith("PIP_")}
    pip.variables |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    return pip


def test_a_package_that_nobody_offers(pip: Pip, tmp_path: Path):
    with pytest.raises(NotOfferedError, match=r"No torch==0\.0\.0 is offered.*setup\.log"):
        pip.download("torch", "--no-deps", "-d", str(tmp_path), "torch==0.0.0")
    assert "torch==0.0.0" in pip.log.read_text()


def test_a_failed_download(pip: Pip, tmp_path: Path):
    """A real connection that is refused: nothing listens on this port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pip.variables |= {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple", "PIP_RETRIES": "1"}
    with pytest.raises(DevError, match="Could not download torch: check the network"):
        pip.download("torch", "--no-deps", "-d", str(tmp_path), "torch==2.13.0")


def test_a_disk_that_fills_up_during_the_download(pip: Pip):
    lines = [
        "Collecting torch",
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
    ]
    assert isinstance(pip.failure("torch", lines), DiskFullError)


# ── two at once ────────────────────────────────────────────────────────────────────────────────────

HOLD_LOCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from devtools.lock import file_lock
with file_lock(Path(sys.argv[2])):
    for i in range(20):
        with open(sys.argv[3], "a") as file:
            file.write(sys.argv[4])
        time.sleep(0.01)
"""


def test_the_lock_lets_one_process_in_at_a_time(tmp_path: Path):
    written = tmp_path / "written"
    arguments = [sys.executable, "-c", HOLD_LOCK, str(ROOT), str(tmp_path / "lock"), str(written)]
    processes = [subprocess.Popen([*arguments, letter]) for letter in "abc"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert re.fullmatch(r"(a{20}|b{20}|c{20}){3}", written.read_text())


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path):
    code = HOLD_LOCK.replace("time.sleep(0.01)", "time.sleep(60)")
    written = tmp_path / "written"
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path / "lock"), str(written), "a"])
    while not written.exists():
        time.sleep(0.02)
    waited = []
    process.kill()
    process.wait()
    with file_lock(tmp_path / "lock", lambda: waited.append(True)):
        pass
    assert waited == []


def test_two_builds_at_once_make_one_environment(tmp_path: Path):
    """The second waits for the first and finds it done. The parts that need the network only say that they ran."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from devtools import install
root = Path({str(tmp_path)!r})
def build(kind):
    def work(*arguments):
        with open(root / "log", "a") as file: file.write(kind + "\\n")
        time.sleep(0.3)
    return work
install.Pip.install = lambda self, title, *arguments: build("install " + title)()
install._build_comfyui = lambda *arguments: (
    build("comfyui")(), (root / ".comfyui").mkdir(),
    (root / ".comfyui" / "requirements.txt").write_text("torch\\nnumpy>=1\\n"),
    install._write_record(root / ".comfyui", install._comfyui_record()),
)
install.require_disk = lambda *arguments: None
print(install.ensure(root).python)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert {out.strip() for out, _ in answers} == {str(tmp_path / ".venv" / "bin" / "python")}
    assert sorted((tmp_path / "log").read_text().split("\n")[:-1]) == sorted(
        [
            "install torch for the CPU" if not install._has_nvidia() else "install torch",
            "install torchvision",
            "comfyui",
            "install packages",
        ]
    )
    assert sum("waiting for it" in err for _, err in answers) == 1
    assert (tmp_path / ".venv" / "pyvenv.cfg").exists()


# ── small parts ────────────────────────────────────────────────────────────────────────────────────


def test_a_free_port_is_accepted_and_an_impossible_one_is_not():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    require_free(port)
    with pytest.raises(DevError, match="Port 70000"):
        require_free(70000)


def test_the_link_to_the_pack_is_made_once_and_never_over_a_folder(tmp_path: Path):
    link = link_pack(tmp_path / "custom_nodes")
    assert link.resolve() == ROOT
    assert link_pack(tmp_path / "custom_nodes") == link
    (tmp_path / "other" / link.name).mkdir(parents=True)
    with pytest.raises(DevError, match="move it away"):
        link_pack(tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], True),
        (["-x", "-q"], True),
        (["tests"], True),
        (["tests/browser/test_page.py::test_x"], True),
        (["tests/host", "tests/browser"], True),
        (["tests/host"], False),
        (["-m", "not browser"], False),
        (["-m", "browser"], True),
    ],
)
def test_the_browser_is_looked_for_only_where_it_is_used(arguments, wanted):
    assert browser.is_wanted(arguments) is wanted


def test_a_bar_is_as_full_as_its_numbers():
    for value in range(11):
        assert bar(value, 10).count("█") == round(value / 10 * len(bar(0, 10).split()[0]))
    assert bar(5, 0).count("█") == 0


def test_progress_in_a_log_has_one_line_per_node(tmp_path: Path):
    prompt = {"1": {"class_type": "A", "_meta": {"title": "first"}}, "2": {"class_type": "B"}}
    with (tmp_path / "log").open("w+") as log:
        progress = NodeProgress(prompt, {"B": {"display_name": "second"}}, log)
        progress("executing", {"node": "1"})
        progress("progress", {"node": "1", "value": 1, "max": 9})
        progress("executing", {"node": "2"})
        progress("executing", {"node": None})
        log.seek(0)
        lines = [line for line in log.read().splitlines() if "█" * 24 in line]
    assert [line.split("]")[1].split()[0] for line in lines] == ["first", "second"]
    assert [line.split("]")[0].strip() for line in lines] == ["[ 1/2", "[ 2/2"]


def test_a_saved_graph_becomes_a_prompt():
    """Widgets by position, the page's own seed control skipped, links resolved, notes left out."""
    info = {
        "Source": {
            "input": {"required": {"seed": ["INT", {"control_after_generate": True}], "kind": [["a", "b"], {}]}}
        },
        "Sink": {
            "input": {
                "required": {"data": ["DATA", {}], "scale": ["FLOAT", {"default": 1.0}]},
                "optional": {
                    "label": ["STRING", {}],
                    "forced": ["INT", {"forceInput": True}],
                    "newer": ["COMBO", {"default": "x", "options": ["x", "y"]}],  # not in the saved graph
                },
            },
            "display_name": "The sink",
        },
    }
    graph = {
        "nodes": [
            {"id": 1, "type": "Source", "widgets_values": [7, "randomize", "b"]},
            {"id": 2, "type": "Sink", "inputs": [{"name": "data", "link": 5}, {"name": "forced", "link": None}],
             "widgets_values": [0.5]},
            {"id": 3, "type": "MarkdownNote", "widgets_values": ["text"]},
        ],
        "links": [[5, 1, 0, 2, 0, "DATA"]],
    }  # fmt: skip
    prompt = workflow.to_prompt(graph, info)
    assert prompt["1"]["inputs"] == {"seed": 7, "kind": "b"}
    assert prompt["2"] == {
        "class_type": "Sink",
        "inputs": {"scale": 0.5, "newer": "x", "data": ["1", 0]},
        "_meta": {"title": "The sink"},
    }
    assert list(prompt) == ["1", "2"]
    with pytest.raises(DevError, match="is a Sink, which this ComfyUI does not have"):
        workflow.to_prompt(graph, {"Source": info["Source"]})
