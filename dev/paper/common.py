"""What every part of the paper's runs needs: where things are, files that are whole or not there, and errors that are
one sentence."""
import json
import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Bad(Exception):
    """Its text is one sentence: what is wrong, and what to do."""


def read_json(path):
    """The value in a file, or None where there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Bad(f"{path} cannot be read as JSON ({error}): delete it, and it is made again") from None


def write_file(path, content):
    """Under another name, synced and renamed: a kill at any instant leaves the old file or the new one."""
    part = path + ".part"
    with open(part, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path, value):
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def from_root(path):
    """A path as commands and tables show it: relative to the repository where it lies in it."""
    full = os.path.abspath(path)
    return os.path.relpath(full, ROOT) if full.startswith(ROOT + os.sep) else full


def read_metrics(folder):
    """(the settings, the updates' lines, the validations' lines) of a run folder, in order."""
    head, updates, validations = {}, [], []
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            for i, line in enumerate(file):
                try:
                    value = json.loads(line)
                except ValueError:  # the line that a kill broke off; the trainer drops it when it resumes
                    continue
                if i == 0:
                    head = value
                elif "loss" in value:
                    updates.append(value)
                elif "val_ce" in value:
                    validations.append(value)
    except FileNotFoundError:
        pass
    return head, updates, validations


def median(values):
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def duration(seconds):
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
