"""Chat templates of the output: named formats, one given as Jinja text, or the one that most models use."""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hf_fuse.checkpoint.reader import read_json
from hf_fuse.checkpoint.tokenizer import EXTRA_TEMPLATES, Tokenizer
from hf_fuse.errors import RecipeError

# Every block trims the white space around it, so that line breaks here are for the reader and none reach the prompt.
_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# The format has no system role: its text opens the first user turn.
_MISTRAL = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set state.system = state.system + message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + state.system + message['content'] + ' [/INST]' }}
{%- set state.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- else -%}
{{ raise_exception('Expected the roles system, user and assistant, got ' + message['role'] + '.') }}
{%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{{ messages[0]['content'] + '\\n\\n' }}
{%- else -%}
{{ 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.\\n\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""

_EXAONE = """\
{%- if not messages or messages[0]['role'] != 'system' -%}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '[|' + message['role'] + '|]' + message['content'] + ('\\n' if message['role'] == 'user' else '[|endofturn|]\\n') }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '[|assistant|]' }}
{%- endif -%}
"""

TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
MARKER = re.compile(r"<\|[\w.-]+\|>|\[\|\w+\|\]|\[/?INST\]")


def chat_template(name_or_jinja: str, tokenizers: Iterable[Tokenizer | None] = ()) -> str:
    """The Jinja text that a recipe's ``chat_template`` means.

    Args:
        name_or_jinja: ``alpaca``, ``chatml``, ``exaone``, ``llama3``, ``mistral``; ``auto`` for the most common one
            among ``tokenizers`` (the first on ties); or Jinja text.
        tokenizers: the models' tokenizers, in recipe order.

    Raises:
        RecipeError: an unknown name, ``auto`` without any template, or text that Jinja cannot parse.
    """
    if name_or_jinja == "auto":
        found = Counter(tokenizer.chat_template for tokenizer in tokenizers if tokenizer and tokenizer.chat_template)
        if not found:
            raise RecipeError(
                f"chat_template: auto takes the models' most common template, but none has one. Name one of "
                f"{', '.join(TEMPLATES)}, or remove chat_template."
            )
        return found.most_common(1)[0][0]  # equal counts keep the order of first appearance
    if name_or_jinja in TEMPLATES:
        return TEMPLATES[name_or_jinja]
    if "{{" not in name_or_jinja and "{%" not in name_or_jinja:
        near = difflib.get_close_matches(name_or_jinja, ["auto", *TEMPLATES], 1)
        raise RecipeError(
            f"chat_template: {name_or_jinja!r} is neither a known name nor Jinja text."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + f" Expected auto, {', '.join(TEMPLATES)}, or a template."
        )
    _check_syntax(name_or_jinja)
    return name_or_jinja


def _check_syntax(template: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError as error:
        if "unknown tag 'generation'" in str(error):  # transformers' own extension, marks what is trained on
            return
        raise RecipeError(f"chat_template: not valid Jinja, line {error.lineno}: {error.message}") from None


def missing_markers(template: str, vocab: Iterable[str]) -> list[str]:
    """Control tokens like ``<|im_start|>`` in ``template`` that ``vocab`` lacks: they would be split into pieces."""
    known = set(vocab)
    spelt = set(MARKER.findall(template))
    if "[|' + message['role']" in template:
        spelt |= {"[|system|]", "[|user|]", "[|assistant|]"}
    return sorted(spelt - known)


def write_chat_template(folder: Path, template: str) -> None:
    """Makes ``template`` the only chat template of the tokenizer in ``folder``."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / EXTRA_TEMPLATES, ignore_errors=True)
    path = folder / "tokenizer_config.json"
    if path.exists():
        config = read_json(path)
        if config.pop("chat_template", None) is not None:
            path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
