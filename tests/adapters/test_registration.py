"""``import hf_fuse`` costs nothing, and yet PEFT knows the adapters, whoever is imported first."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest

import hf_fuse
from hf_fuse.adapters._peft import METHODS, register

LATER = """
import importlib.util, sys
import hf_fuse
assert not {"torch", "transformers", "peft"} & set(sys.modules), "import hf_fuse must stay cheap"
spec = importlib.util.find_spec("peft")  # as transformers does to see whether PEFT is there
assert spec.origin and "hf_fuse.adapters" not in sys.modules
from peft import PeftConfig, PeftType
assert PeftType.MIXLORA == "MIXLORA"
assert [type(finder).__name__ for finder in sys.meta_path].count("_AfterPeft") == 0
assert PeftConfig.from_peft_type(peft_type="MIXLORA").num_experts == 8
from hf_fuse import MixLoraConfig
assert type(PeftConfig.from_peft_type(peft_type="MIXLORA")) is MixLoraConfig
"""


def test_peft_imported_later():
    subprocess.run([sys.executable, "-c", LATER], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_member_of_the_enumeration(name):
    peft_type = peft.PeftType[name.upper()]
    assert peft_type is peft.PeftType(name.upper()) and peft_type in list(peft.PeftType)
    assert pickle.loads(pickle.dumps(peft_type)) is peft_type is copy.deepcopy(peft_type)
    assert peft_type.value == str(peft_type.name) == name.upper()


def test_registering_twice_or_over_peft_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    before = dict(CONFIGS), len(peft.PeftType)
    register("mola", hf_fuse.MixLoraConfig, None)
    register("lora", hf_fuse.MixLoraConfig, None)
    assert (dict(CONFIGS), len(peft.PeftType)) == before
