"""The `jepa` command: verbs, presets, key=value overrides, dry runs, and exit codes that say whether to try again.

Verbs are imported when they run, never for --help or for a mistake in the configuration.
"""

import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import yaml

from pipelines import presets, redact
from pipelines.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, JepaError, UsageError
from pipelines.progress import Reporter
from pipelines.verbs import VERBS, Verb

KEY = re.compile(r"[A-Za-z_][\w.]*=")
"""How key=value begins; a path or a question may hold = further on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code, see `_overview`: 0 done, 75 try again."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    reporter = Reporter()
    try:
        return _run(arguments, reporter)
    except JepaError as error:
        return _fail(reporter, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(reporter, "interrupted: the same command continues where a checkpoint was committed", EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has gone: what we did was not followed to its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 128 + signal.SIGPIPE
    finally:
        reporter.stop()


def _run(arguments: list[str], reporter: Reporter) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return EXIT_OK if arguments else UsageError.exit_code
    name, rest = split_verb(arguments)
    if name not in VERBS:
        print(_overview(f"{name} "))
        return EXIT_OK if rest else UsageError.exit_code
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        print(_help(name, verb))
        return EXIT_OK
    redact.refuse(rest)
    config = presets.load(verb.options, name, overrides(verb, [item for item in rest if item != "--dry-run"]))
    redact.refuse(presets.to_yaml(config).splitlines())  # a preset file of the user's may hold one
    if "--dry-run" in rest:
        print(_dry_run(name, verb, config))
        return EXIT_OK
    if hasattr(config, "preflight"):
        config.preflight()
    result = importlib.import_module(verb.module).run(config, reporter)
    reporter.summary(name, **result)
    return EXIT_OK


def checked_command(command: Sequence[str]) -> tuple[str, list[str], Any]:
    """(verb, its words, its configuration) of a command that is to run elsewhere. Raises UsageError as it would there."""
    if not command:
        raise UsageError("no verb: name it after the options, for example jepa submit pretrain preset=NAME")
    name, rest = split_verb(command)
    if name not in VERBS:
        raise UsageError(f"jepa {name} is the first word of several verbs: jepa {name} --help lists them")
    if VERBS[name].trailing:
        raise UsageError(f"jepa {name} cannot itself be a job: name the verb that is to run")
    return name, rest, presets.load(VERBS[name].options, name, overrides(VERBS[name], rest))


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The verb and its arguments. A verb may be of two words; the first of them alone, or with --help, stands for all its pairs.

    Raises UsageError for words that are no verb.
    """
    first, *rest = arguments
    pair = f"{first} {rest[0]}" if rest else ""
    if pair in VERBS:
        return pair, rest[1:]
    pairs = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    if first in VERBS or (pairs and (not rest or rest[0] in ("-h", "--help"))):
        return first, rest
    if pairs:
        raise UsageError(f"jepa {first} {rest[0]}: the word after {first} is one of {', '.join(pairs)}")
    names = dict.fromkeys(name.split()[0] for name in VERBS)
    raise UsageError(f"unknown verb {first!r}: choose from {', '.join(names)}")


def overrides(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """Words and flags of a command as key=value. Raises UsageError for a flag that the verb does not have."""
    settings, flags, places, words = [], dict(verb.flags), list(verb.positional), list(arguments)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            flag, equals, value = word.removeprefix("--").partition("=")
            if flag not in flags:
                known = ", ".join(f"--{name}" for name in (*flags, "help", "dry-run"))
                raise UsageError(f"unknown option {word}: options are written key=value; flags are {known}")
            if _is_switch(verb.options, flags[flag]):
                words.insert(0, value if equals else "true")
            elif equals:
                words.insert(0, value)
            if not words:
                raise UsageError(f"{word} needs a value: write {word} VALUE")
            settings.append(f"{flags[flag]}={words.pop(0)}")
        elif places and not KEY.match(word):
            settings.append(f"{places.pop(0)}={_as_yaml(word)}")
        elif verb.trailing and "=" not in word:
            return [*settings, f"{verb.trailing}={json.dumps([word, *words])}"]
        else:
            settings.append(word)
    return settings


def _as_yaml(word: str) -> str:
    """A word that means itself, whatever YAML would make of it: a question may hold colons and quotes."""
    try:
        return word if yaml.safe_load(word) == word else json.dumps(word, ensure_ascii=False)
    except yaml.YAMLError:
        return json.dumps(word, ensure_ascii=False)


def _is_switch(options: type, name: str) -> bool:
    return {field.name: field.type for field in fields(options)}[name] in (bool, "bool")


def _fail(reporter: Reporter, message: str, code: int) -> int:
    reporter.stop()
    message = redact.redacted(message)
    if reporter.terminal:
        print(f"jepa: {message}", file=sys.stderr)
    else:
        retry = code == 75
        print(json.dumps({"event": "error", "message": message, "exit_code": code, "retry": retry}), file=sys.stderr)
    return code or EXIT_BUG


def _overview(prefix: str = "") -> str:
    shown = {name: verb.summary for name, verb in VERBS.items() if name.startswith(prefix)}
    width = max(map(len, shown)) + 1
    lines = [f"  {name:<{width}} {summary}" for name, summary in shown.items()]
    return "\n".join(
        [
            f"usage: jepa {prefix}VERB [preset=NAME] [key=value ...] [--dry-run] [--help]",
            "",
            "From a bucket of raw video to a robot that plans: V-JEPA 2 on Ray.",
            "",
            *lines,
            "",
            "exit codes: 0 done, 2 usage or configuration, 3 input refused, 4 condition missed, 75 try again, 1 a bug,",
            "130 interrupted",
        ]
    )


def _help(name: str, verb: Verb) -> str:
    names = ", ".join(presets.preset_names(name)) or "none"
    doc = (verb.options.__doc__ or "").strip()
    return "\n".join([doc, "", f"presets: {names}  (smoke=true takes a preset's small twin)", "", *_options(verb.options)])


def _options(options: type) -> list[str]:
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.structured(options)).replace("???", "(required)").rstrip()
    first = f"options of {options.__name__} and their defaults, written as dotted key=value:"
    return [first, *(f"  {line}" for line in text.splitlines())]


def _dry_run(name: str, verb: Verb, config: Any) -> str:
    def uris(keys: tuple[str, ...]) -> str:
        values = []
        for key in keys:
            value = config
            for part in key.split("."):
                value = getattr(value, part)
            values.append(f"{value or '(default)'} ({key})")
        return ", ".join(values) or "nothing"

    text = presets.to_yaml(config).rstrip()
    return f"{text}\n# jepa {name} would read: {uris(verb.reads)}\n# jepa {name} would write: {uris(verb.writes)}"


if __name__ == "__main__":
    sys.exit(main())
