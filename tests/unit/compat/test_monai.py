"""MONAI in a process of ctflow's own: without packages that segmentation does not need, which stay usable."""

import os
import subprocess
import sys
from pathlib import Path

LEAN = "from ctflow.compat.monai import import_lean, import_monai; import_lean();"
NETWORK = "from ctflow.networks.build import network_class; network_class('SwinUNETR');"


def run_afresh(code: str, packages: Path) -> None:
    """Run code in a process that has imported nothing and finds these packages first; what it asserts has to hold."""
    path = os.pathsep.join([str(packages), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def write_package(folder: Path, name: str, code: str) -> None:
    """A package whose import runs this code."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_an_own_process_leaves_out_what_monai_imports_because_it_is_there(tmp_path):
    names = {"transformers", "ignite", "huggingface_hub", "torchaudio"}
    for name in names:
        write_package(tmp_path, name, "raise SystemExit('imported')")
    run_afresh(f"import sys; {LEAN}{NETWORK} assert not {names} & set(sys.modules)", tmp_path)


def test_another_process_has_monai_import_what_it_likes(tmp_path):
    write_package(tmp_path, "transformers", "open('seen', 'w').close()")
    run_afresh(f"import os; os.chdir({str(tmp_path)!r}); {NETWORK} assert os.path.exists('seen')", tmp_path)


def test_what_was_left_out_can_be_imported_later_and_what_is_imported_already_is_left_whole(tmp_path):
    write_package(tmp_path, "torchvision", "there = True")
    write_package(tmp_path, "transformers", "")
    (tmp_path / "transformers" / "utils.py").write_text("cached_file = 'there'")
    code = (
        f"import sys, transformers; {LEAN} import_monai(); from monai.networks.nets import transchex\n"
        f"{NETWORK} assert sys.modules['transformers'] is transformers and transchex.cached_file == 'there'\n"
        "import torchvision; assert torchvision.there"
    )
    run_afresh(code, tmp_path)


def test_a_network_that_needs_what_is_left_out_is_refused_by_name(tmp_path):
    code = (
        f"{LEAN} from ctflow.core.errors import BundleInvalid; from ctflow.core.model import NetworkSpec\n"
        "from ctflow.networks.build import network_from_spec\n"
        "try: network_from_spec(NetworkSpec('MILModel', {'num_classes': 2, 'pretrained': False}))\n"
        "except BundleInvalid as error: assert error.reason == 'network' and 'torchvision' in str(error), error\n"
        "else: raise AssertionError"
    )
    run_afresh(code, tmp_path)


def test_the_app_sdk_needs_no_network_of_monai_and_one_can_follow(tmp_path):
    code = (
        f"import sys; {LEAN} from ctflow.compat.monai import import_for_app_sdk; import_for_app_sdk()\n"
        "from ctflow.compat.holoscan import load_cuda_runtime; load_cuda_runtime(); import monai.deploy.core\n"
        "assert not {'monai.apps', 'monai.networks', 'monai.data', 'ignite'} & set(sys.modules)\n"
        f"{NETWORK} import monai.apps, monai.bundle, monai.transforms"
    )
    run_afresh(code, tmp_path)


def test_another_application_of_the_app_sdk_has_all_of_monai(tmp_path):
    code = (
        "from ctflow.compat.monai import import_for_app_sdk; import_for_app_sdk()\n"
        "from monai.transforms import Compose; from monai.networks.nets import UNet"
    )
    run_afresh(code, tmp_path)


def test_another_thread_finds_everything_meanwhile(tmp_path):
    """The node's threads import as they need while the worker opens its engine."""
    write_package(tmp_path, "transformers", "there = True")
    code = (
        "import threading; from ctflow.compat import monai as m\n"
        "found = []\n"
        "def look():\n"
        "    import transformers; found.append(transformers.there)\n"
        "with m._left_out(frozenset({'transformers'})):\n"
        "    try: import transformers\n"
        "    except ModuleNotFoundError as error: assert error.name == 'transformers'\n"
        "    else: raise AssertionError\n"
        "    thread = threading.Thread(target=look); thread.start(); thread.join()\n"
        "assert found == [True]"
    )
    run_afresh(code, tmp_path)


def test_a_network_computes_the_same_either_way(tmp_path):
    code = (
        "{}import torch; from ctflow.networks.build import network_class; torch.manual_seed(0)\n"
        "net = network_class('SwinUNETR')(in_channels=1, out_channels=2, feature_size=12).eval()\n"
        "with torch.no_grad(): torch.save(net(torch.rand(1, 1, 64, 32, 32)), {!r})"
    )
    run_afresh(code.format(LEAN, str(tmp_path / "lean")), tmp_path)
    exec(code.format("", str(tmp_path / "whole")))  # this process is not ctflow's own and has all of MONAI
    import torch  # noqa: PLC0415

    assert torch.equal(torch.load(tmp_path / "lean"), torch.load(tmp_path / "whole"))
