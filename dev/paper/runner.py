"""Runs the plan: the programs' command lines, several cells side by side, each step skipped if what it makes is there.

    DIR/plan.json  chosen.json  speed.json  decode.json  tables.md  results.json  *.png
    DIR/runs/NAME/      a run folder of the trainer, and of ours: train.log, eval.json, tasks.json, cell.json
    DIR/reports/NAME/   infer_gpt2's report, for the plain and the chosen cells
    DIR/maps/NAME/      the same on maps.txt, for attention maps of a text that a person can follow

A cell is done when its last checkpoint, eval.json and cell.json are there. Then its optimizer.safetensors and its
earlier checkpoints are deleted, which are most of its bytes; the trained model stays.
"""
import ctypes
import datetime
import fcntl
import glob
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import time

from common import ROOT, Bad, duration, finished_metrics, from_root, median, read_json, read_metrics, write_json
from plan import K, LAYER0, SEEDS, candidates, cell_seconds, final_seconds, start_of, with_seed
from shapes import CHOSEN, DECODE, SPEED
from tables import chosen_cells, read_eval, top_loss

CUTS = "1,2,4,8,16,32,64"
CALIBRATION_UPDATES = 12
SPEED_UPDATES = 12


def lock(out):
    """Held as long as this program or any that it started lives, so that no two work in the same folder."""
    file = open(os.path.join(out, "lock"), "w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Bad(f"another run.sh is at work in {from_root(out)}: wait for it, or name another folder with "
                  "--out") from None
    return file


def die_with_parent():
    """In a child, before it becomes the program: SIGKILL when we are gone, however we went."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Programs:
    def __init__(self, gpu):
        self.train, self.infer = (self.find(name, gpu) for name in ("train_gpt2", "infer_gpt2"))

    @staticmethod
    def find(name, gpu):
        for program in [name + "cu"] if gpu else [name + "cpu", name + "cu"]:
            if os.access(os.path.join(ROOT, program), os.X_OK):
                return "./" + program
        raise Bad(f"there is no {name}cu: make {name}cu builds it")

    def help(self, program):
        return subprocess.run([program, "--help"], cwd=ROOT, stdout=subprocess.PIPE, check=False).stdout.decode()

    def can(self):
        """What the trainer's table of flags has of what came after its first version."""
        text = self.help(self.train)
        return [what for what, sign in (("entropy", r"--reg \S*entropy"), ("target", r"--target-loss"))
                if re.search(sign, text)]

    def cut_kinds(self):
        return "--cut-kinds" in self.help(self.infer)


# ---- command lines ----

def val_rows(plan):
    return plan["eval_tokens"] // plan["context"]


def eval_batch(rows):
    """Sequences at a time: the number of rows has to be whole batches, for the trainer and here."""
    return max(b for b in range(1, 17) if rows % b == 0)


def train_command(plan, programs, cell, folder):
    updates = plan["updates"]
    lam, reg = cell["lambda"], cell["reg"]
    layers = []
    if cell["layers"]:
        factor, _ = LAYER0[cell["layers"]]
        layers = ["--lambda-layers", ",".join([str(factor)] + ["1"] * (plan["layers"] - 1))]
    start = ["--lambda-start", start_of(cell)] if start_of(cell) != "0" else []
    margin = []
    if "margin" in cell:
        plain = os.path.join(os.path.dirname(folder), f"plain-s{cell['seed']}", "metrics.jsonl")
        margin = ["--target-loss", f"{plain}:{cell['margin']:g}"]
    every = max(1, -(-updates // 2))
    return [programs.train, "-e", "124M" if cell["family"] == "continued" else plan["size"], "-o", folder, "-y",
            "-i", plan["train_data"], "-j", plan["val_data"], "-x", str(updates), "-n", str(every), "-v", str(every),
            "-m", str(val_rows(plan) // plan["batch"]), "-s", "0", "-b", str(plan["batch"]),
            "-t", str(plan["context"]), "-d", str(plan["tokens_per_update"]), "-l", f"{lam:g}", "-k", str(cell["k"]),
            "--reg", reg, *start, "--lambda-warmup", cell["rise"], *layers, *margin, "--seed", str(cell["seed"])]


def eval_command(plan, programs, model, json, kinds):
    rows = val_rows(plan)
    batch = eval_batch(rows)
    few = ["--cut-kinds", kinds] if kinds else []
    return [programs.infer, "-e", model, "--eval", plan["val_data"], "-t", str(plan["context"]), "-b", str(batch),
            "-m", str(rows // batch), "--cuts", CUTS, *few, "--json", json]


def report_command(plan, programs, model, folder, json):
    """Attention's statistics on the first quarter of the validation tokens, and the probes."""
    rows = max(1, val_rows(plan) // 4)
    batch = eval_batch(rows)
    return [programs.infer, "-e", model, "-j", plan["val_data"], "-t", str(plan["context"]), "-b", str(batch), "-m",
            str(rows // batch), "--probes", "--limit", str(plan["limit"]), "-k", str(K), "--cuts", str(K),
            "--report", folder, "--json", json]


def windows(pattern, context):
    """How many rows of `context` tokens, with the token that follows, the shards have."""
    found = 0
    for path in glob.glob(os.path.join(ROOT, pattern)):
        with open(path, "rb") as file:
            found += max(0, struct.unpack("<4i", file.read(16))[2] - 1) // context
    return found


# ---- how long things take ----

def calibrate(out, plan, programs):
    """measure() below; whatever ends it, the trainers that it started are gone then."""
    started = []
    try:
        return measure(out, plan, programs, started)
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(out, plan, programs, started):
    """Measures on this machine what the plan needs: the time of an update, alone with all threads and side by side with
    one thread each, of an evaluation and of a report; and what the trainer chose for batch and update."""
    folder = os.path.join(out, "calibration")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    cores = all_cores()
    options = plan["options"]
    shape = [flag for name, flag in (("batch", "-b"), ("context", "-t")) if options[name]
             for flag in (flag, str(options[name]))]

    def start(name, threads):
        command = [programs.train, "-e", plan["size"], "-o", from_root(os.path.join(folder, name)), "-i",
                   plan["train_data"], "-j", plan["val_data"], "-x", str(CALIBRATION_UPDATES), "-n",
                   str(CALIBRATION_UPDATES), "-v", "0", "-s", "0", "-l", "0.1", "-k", str(K), *shape]
        with open(os.path.join(folder, name + ".log"), "wb") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                            stdin=subprocess.DEVNULL, env=environment(threads),
                                            preexec_fn=die_with_parent))
        return started[-1]

    def finish(name, process):
        if process.wait() != 0:
            raise Bad(f"the trainer stopped: {last_line(os.path.join(folder, name + '.log'))}")
        head, updates, _ = read_metrics(os.path.join(folder, name))
        return head, median([u["ms"] for u in updates[3:]]) / 1000

    if plan["gpu"]:
        finish("first", start("first", cores))  # which times the matmuls' algorithms, and later runs need not
    begin = time.monotonic()
    head, alone = finish("alone", start("alone", cores))
    start_s = max(0.0, time.monotonic() - begin - CALIBRATION_UPDATES * alone)
    settings = head["settings"]
    batch, context = int(settings["batch"]), int(settings["context"])
    workers, why = 1, "one GPU"
    update_s = alone
    if not plan["gpu"]:
        side = min(cores, 8)
        runs = [(f"beside{i}", start(f"beside{i}", 1)) for i in range(side)] if side > 1 else []
        beside = median([finish(name, process)[1] for name, process in runs]) if runs else alone
        if side > 1 and side / beside > 1 / alone:
            workers, update_s = side, beside
        why = (f"updates a second: {1 / alone:.2f} one run with {cores} threads, {side / beside:.2f} {side} runs with "
               "one thread each" if side > 1 else "one core")
    threads = 1 if workers > 1 else cores

    there = windows(plan["val_data"], context)
    if there < batch:
        raise Bad(f"{plan['val_data']} has {there} rows of {context} tokens, and a micro-batch has {batch}: name other "
                  "data with --data, or a smaller --batch or --context")
    rows = max(batch, min(options["eval_tokens"] // context, there) // batch * batch)
    facts = {"batch": batch, "context": context, "tokens_per_update": int(settings["tokens-per-update"]),
             "eval_tokens": rows * context, "workers": workers, "threads": threads, "why_workers": why,
             "device": re.sub(r" \(\d+ threads?\)", "", head["device"]) + ("" if plan["gpu"] else f", {cores} cores"),
             "precision": settings["precision"], "model": settings["model"], "data_tokens": settings["training data"]}
    eight = {**plan, **facts, "eval_tokens": max(1, rows // 8) * context}
    model = from_root(os.path.join(folder, "alone"))

    def timed(command):
        begin = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
                              preexec_fn=die_with_parent)
        if done.returncode != 0:
            raise Bad(f"{' '.join(command)} stopped: {done.stdout.decode().strip().splitlines()[-1]}")
        return time.monotonic() - begin

    kinds = "topk" if programs.cut_kinds() else None
    scale = rows / (val_rows(eight))
    cuts = len(CUTS.split(","))
    eval_s = scale * timed(eval_command(eight, programs, model, os.devnull, kinds))
    report_s = timed(report_command({**plan, **facts}, programs, model, from_root(os.path.join(folder, "report")),
                                    os.devnull))
    tokens = rows * context
    checkpoint = os.path.join(folder, "alone", f"step_{CALIBRATION_UPDATES:08d}")
    facts["model_bytes"], facts["checkpoint_bytes"] = (
        sum(os.path.getsize(os.path.join(checkpoint, name)) for name in names)
        for names in (["model.safetensors"], os.listdir(checkpoint)))
    facts["measured"] = {
        "update_s": update_s, "start_s": start_s, "eval_s": eval_s,
        "validation_s": update_s * tokens / facts["tokens_per_update"] / 3,  # a forward pass is a third of an update
        # what is reported of is also evaluated with every kind of cut, renormalized and not, in place of one
        "report_s": report_s + (eval_s * 7 * cuts / (1 + cuts) if kinds else 0), "figures_s": 30.0,
        "speed_s": 4 * plan["rounds"] * (start_s + SPEED_UPDATES * alone)
        # and a guess for decoding: three models, three ways, one and 32 texts of a thousand tokens
        + plan["rounds"] * (18 * (start_s + 1.5) if plan["gpu"] else 10)}
    shutil.rmtree(folder)
    return facts


def all_cores():
    return len(os.sched_getaffinity(0))


def environment(threads):
    """For the programs; with all processors, they choose the number of threads: a container's CPU quota may leave fewer.
    A PATH without python3: infer_gpt2 --report would draw a page of each report, in seconds each; dev/report/page.py
    DIR/reports/NAME draws one when it is wanted."""
    few = {"OMP_NUM_THREADS": str(threads)} if threads < all_cores() else {}
    return dict(os.environ, PATH="/nonexistent", **few)


def last_line(log):
    """What a program said last: its error, without the progress."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = [line for line in re.split(r"[\r\n]+", file.read()) if line.strip()]
    except OSError:
        return "it left no log"
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].strip()


# ---- running ----

class Failed(Exception):
    pass


class Slot:
    """A cell that is being run: one step of it after another."""

    def __init__(self, planned, cell, runner):
        self.planned, self.cell, self.runner = planned, cell, runner
        self.fresh = not os.path.exists(runner.folder(cell))
        self.steps, self.begin = runner.steps(cell), time.monotonic()
        self.process = self.log = self.problem = None

    def advance(self):
        """Starts the next step if the last has ended; true if there is none, or if the last has failed."""
        if self.process and not self.runner.ended(self.process):
            return False
        if self.process and self.process.returncode != 0:
            self.problem = last_line(self.log)
            return True
        command, self.log = next(self.steps, (None, None))
        if command:
            self.process = self.runner.start(command, self.runner.plan["threads"], self.log)
        return not command


class Runner:
    def __init__(self, out, plan, programs, budget, held):
        self.out, self.plan, self.programs, self.held = out, plan, programs, held
        self.kinds = programs.cut_kinds()
        self.deadline = time.monotonic() + budget
        self.processes = []
        self.count = 0  # cells that are dealt with
        self.took = []  # seconds of those that were run here from their beginning
        os.makedirs(os.path.join(out, "runs"), exist_ok=True)

    def path(self, *names):
        return os.path.join(self.out, *names)

    def folder(self, cell):
        return self.path("runs", cell["name"])

    def model(self, cell):
        """What -e takes: the run folder; OpenAI's weights for the model that is not trained."""
        return "124M" if cell["group"] == "untrained" else from_root(self.folder(cell))

    def checkpoint(self, cell):
        return os.path.join(self.folder(cell), f"step_{self.plan['updates']:08d}")

    def trained(self, cell):
        return cell["group"] == "untrained" or os.path.exists(os.path.join(self.checkpoint(cell), "model.safetensors"))

    def done(self, cell):
        return self.trained(cell) and all(os.path.exists(os.path.join(self.folder(cell), name))
                                          for name in ("eval.json", "cell.json"))

    # ---- processes

    def start(self, command, threads, log):
        with open(log, "ab") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, env=environment(threads), start_new_session=True,
                                       pass_fds=(self.held.fileno(),), preexec_fn=die_with_parent)
        self.processes.append(process)
        return process

    def stop(self):
        """The trainer finishes its update and saves; then the programs are gone. Not by SIGINT, which they ignore where
        run.sh was started in the background of a script."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 60
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ended(self, process):
        if process.poll() is None:
            return False
        self.processes.remove(process)
        return True

    def wait(self, command, threads, log):
        process = self.start(command, threads, log)
        while not self.ended(process):
            time.sleep(0.05)
        if process.returncode != 0:
            raise Failed(f"{os.path.basename(command[0])}: {last_line(log)}")

    def run_alone(self, command, name, what):
        """With the whole machine: what the program says, or None where it fails, which a line says of `what`."""
        log = self.path(name + ".log")
        open(log, "wb").close()
        try:
            self.wait(command, all_cores(), log)
        except Failed as problem:
            print(f"{what}: {problem}", flush=True)
            return None
        with open(log, encoding="utf-8", errors="replace") as file:
            return file.read()

    # ---- a cell

    def steps(self, cell):
        """Yields (command, log) for what is not there yet; goes on when that has ended well."""
        plan, folder = self.plan, self.folder(cell)
        os.makedirs(folder, exist_ok=True)
        train = None
        if cell["group"] != "untrained":
            train = train_command(plan, self.programs, cell, from_root(folder))
            # A signal may have cut short the validation behind the last update.
            if not (self.trained(cell) and any(v["step"] == plan["updates"] for v in read_metrics(folder)[2])):
                yield train, os.path.join(folder, "train.log")
        result = os.path.join(folder, "eval.json")
        close = cell["group"] in ("plain", "chosen") and not plan.get("seeds")
        kinds = "topk" if self.kinds and not close else None
        command = eval_command(plan, self.programs, self.model(cell), from_root(result + ".part"), kinds)
        if not os.path.exists(result):
            yield command, os.path.join(folder, "eval.log")
            os.replace(result + ".part", result)
        head, updates, _ = read_metrics(folder)
        measured = read_eval(folder)
        write_json(os.path.join(folder, "cell.json"), {
            "settings": cell, "commands": [shlex.join(c) for c in (train, command) if c],
            "commit": head.get("commit") or measured["commit"],
            "device": head.get("device") or measured["device"],
            "date": datetime.date.today().isoformat(), "updates": len(updates), "side_by_side": plan["workers"],
            "training_s": sum(u["ms"] for u in updates) / 1000})

    def clean(self, cell):
        for path in glob.glob(os.path.join(self.folder(cell), "step_*")):
            if os.path.basename(path) != os.path.basename(self.checkpoint(cell)):
                shutil.rmtree(path)
        optimizer = os.path.join(self.checkpoint(cell), "optimizer.safetensors")
        if os.path.exists(optimizer):
            os.remove(optimizer)

    # ---- the chosen cells

    def resolve(self, cell):
        """The cell to run for one of the plan's, or None if there is none to choose from. All candidates have been
        tried then, so the choice is written down, and stands, unless one has failed: the next call tries it again."""
        if not cell.get("pick"):
            return cell
        family = cell["family"]
        path = self.path("chosen.json")
        chosen = read_json(path, CHOSEN) or {}
        if family not in chosen:
            chosen[family] = chosen_cells(self.out, self.plan, family)
            if not any(os.path.exists(os.path.join(self.folder(c), "failed.json"))
                       for c in candidates(self.plan["cells"], family)):
                write_json(path, chosen)
        found = chosen[family].get(cell["pick"])
        return found and with_seed(found, cell)

    def ready(self, cell, open_cells):
        """Whether what the cell needs has been tried."""
        if cell.get("pick"):
            names = {c["name"] for c in candidates(self.plan["cells"], cell["family"])}
            return not any(c["name"] in names for c in open_cells)
        if "margin" in cell:
            return not any(c["name"] == f"plain-s{cell['seed']}" for c in open_cells)
        return True

    # ---- everything

    def check_data(self):
        """All cells are to have seen the same tokens: shards of the same names may be others by now."""
        seen = {"data-digest": {}, "val-digest": {}}
        for cell in self.plan["cells"]:
            if os.path.exists(os.path.join(self.folder(cell), "cell.json")) and cell["group"] != "untrained":
                if self.done(cell):  # what is missing is named now, rather than when the tables are written
                    head, _, _ = finished_metrics(self.folder(cell), cell, self.plan["updates"])
                else:
                    head, _, _ = read_metrics(self.folder(cell))
                for key, digests in seen.items():
                    digests.setdefault(head.get("settings", {}).get(key), cell["name"])
        for (key, digests), verb, data in zip(seen.items(), ("trained", "validated"), ("train_data", "val_data")):
            digests.pop(None, None)  # runs from before there was one
            if len(digests) > 1:
                one, other = list(digests.values())[:2]
                raise Bad(f"{other} was {verb} on other tokens than {one}, though both name {self.plan[data]}: put the "
                          f"shards back and delete {from_root(self.path('runs', other))} and what was made after it, or "
                          "name another folder with --out")

    def run(self):
        self.check_data()
        self.run_cells()
        self.check_data()
        if self.plan.get("seeds"):
            return
        shown = self.shown()
        for cell in shown:
            self.report(cell)
        self.speed()
        self.decode([c for c in shown if c["seed"] == shown[0]["seed"]])

    def run_cells(self):
        """As many cells side by side as the plan says, in its order, until all are done or no time is left."""
        waiting, running = [], []
        missing = [c for c in self.plan["cells"] if not c.get("pick") and not self.done(c)]
        for cell in self.plan["cells"]:
            resolved = self.resolve(cell) if not cell.get("pick") or self.ready(cell, missing) else None
            if resolved and self.done(resolved):
                self.clean(resolved)
            else:
                waiting.append(cell)
        self.count = len(self.plan["cells"]) - len(waiting)
        if self.count:
            print(f"{self.count} of {len(self.plan['cells'])} cells are done", flush=True)
        while waiting or running:
            while waiting and len(running) < self.plan["workers"]:
                open_cells = waiting + [slot.planned for slot in running]
                cell = next((c for c in waiting if self.ready(c, open_cells)), None)
                if cell is None:
                    break
                if not self.fits(cell):
                    names = ", ".join(c["name"] for c in waiting)
                    goes_on = "the same command goes on with them" if self.took else (
                        f"with a --budget of {math.ceil(self.needs(cell) / 60 + 1)}m or more the same command does them")
                    print(f"no time is left for {len(waiting)} cells: {names}; {goes_on}", flush=True)
                    waiting.clear()
                    break
                waiting.remove(cell)
                resolved = self.resolve(cell)
                if resolved is None:
                    self.count += 1
                    print(f"{cell['name']}: there is nothing to choose from", flush=True)
                elif self.done(resolved):
                    self.count += 1
                    self.clean(resolved)
                    print(f"{self.count}/{len(self.plan['cells'])}  {resolved['name']} is done", flush=True)
                else:
                    running.append(Slot(cell, resolved, self))
            for slot in list(running):
                if slot.advance():
                    running.remove(slot)
                    self.finish(slot)
            time.sleep(0.05)

    def needs(self, cell):
        """Seconds that must be left for a cell to begin, by what cells took here, or else by the plan; half a cell too
        late is early enough. Speeds that an earlier call has measured take no time again."""
        measured = self.plan["measured"]
        seconds = statistics.mean(self.took) if self.took else cell_seconds(cell, self.plan["updates"], measured)
        if all(os.path.exists(self.path(name)) for name in ("speed.json", "decode.json")):
            measured = {**measured, "speed_s": 0.0}
        return 0.5 * seconds + final_seconds(self.plan["cells"], measured)

    def fits(self, cell):
        return time.monotonic() + self.needs(cell) <= self.deadline

    def finish(self, slot):
        self.count += 1
        folder, seconds = self.folder(slot.cell), time.monotonic() - slot.begin
        line = f"{self.count}/{len(self.plan['cells'])}  {slot.cell['name']:34} {duration(seconds):>7}  "
        failed = os.path.join(folder, "failed.json")
        if slot.problem:
            write_json(failed, {"settings": slot.cell, "error": slot.problem})
            print(line + f"FAILED: {slot.problem}", flush=True)
            if slot.planned is self.plan["cells"][0]:
                self.stop()
                raise Bad(f"the first cell failed, with which all others are compared: {slot.problem}")
            return
        if slot.fresh:
            self.took.append(seconds)
        self.clean(slot.cell)
        if os.path.exists(failed):
            os.remove(failed)
        loss = read_eval(folder)["eval"]
        dense = loss["dense"]["loss"]
        print(line + f"loss {dense:.4f}, cut to the top {K} {top_loss(loss, K) - dense:+.4f}", flush=True)

    def shown(self):
        """The cells that are looked at closely: plain and chosen, of all seeds that are done."""
        cells = []
        for family in ("scratch", "continued"):
            mine = [c for c in self.plan["cells"] if c["family"] == family]
            if not mine:
                continue
            cells += [c for c in mine if c["group"] in ("plain", "untrained")]
            chosen = chosen_cells(self.out, self.plan, family)
            cells += chosen.values()
            cells += [with_seed(chosen[c["pick"]], c) for c in mine if c.get("pick") in chosen]
        found = [c for c in cells if c and self.done(c)]
        if not found:
            raise Bad("no plain cell is done, and without one there is nothing to compare: give a longer --budget")
        return found

    def report(self, cell):
        folder, name = self.folder(cell), cell["name"]
        model = self.model(cell)
        result = os.path.join(folder, "eval.json")
        kinds = {c["cut"] for c in read_eval(folder)["eval"]["cuts"]}
        log = os.path.join(folder, "eval.log")
        cores = all_cores()

        def make(what, final, command):
            print(f"{name}: {what}", flush=True)
            try:
                self.wait(command, cores, log)
                if os.path.exists(final + ".part"):
                    os.replace(final + ".part", final)
            except Failed as problem:
                print(f"{name}: {problem}", flush=True)

        if len(kinds) == 1:  # the cell was chosen only later: now the controls, too
            make("losses of the controls", result,
                 eval_command(self.plan, self.programs, model, from_root(result + ".part"), None))
        probes, report = os.path.join(folder, "probes.json"), self.path("reports", name)
        if not (os.path.exists(probes) and os.path.exists(os.path.join(report, "report.json"))):
            make("attention and probes", probes,
                 report_command(self.plan, self.programs, model, from_root(report), from_root(probes + ".part")))
        lambada = os.path.join(ROOT, "data/lambada_test.jsonl")
        hellaswag = os.path.join(ROOT, "data/hellaswag_val.jsonl")
        tasks = []
        if os.path.exists(lambada):
            tasks += ["--lambada", from_root(lambada)]
        if os.path.exists(hellaswag) and self.plan["size"] != "tiny":
            tasks += ["--hellaswag", from_root(hellaswag)]
        final = os.path.join(folder, "tasks.json")
        if tasks and not os.path.exists(final):
            limit = {"tiny": "100", "d6": "1000", "d12": "0"}[self.plan["size"]]
            make("tasks", final, [self.programs.infer, "-e", model, *tasks, "--limit", limit, "-k", str(K), "--json",
                         from_root(final + ".part")])
        maps = self.path("maps", name)
        if cell["seed"] == SEEDS[0] and not os.path.exists(os.path.join(maps, "report.json")):
            os.makedirs(self.path("maps"), exist_ok=True)
            make("maps of a short text", maps, [
                self.programs.infer, "-e", model, "-j", "dev/paper/maps.txt", "-b", "1", "-m", "1", "--cuts", str(K),
                "-k", str(K), "--report", from_root(maps)])

    def speed(self):
        """Training with and without the regularizer, alone on the machine, in turns; DIR/speed.json."""
        final = self.path("speed.json")
        plan = dict(self.plan, updates=SPEED_UPDATES)
        base = dict(self.plan["cells"][0], family="scratch", rise="0", layers="", seed=SEEDS[0], group="speed")
        base.pop("margin", None)
        ways = [("plain, not measured", dict(base, k=0, reg="tail", **{"lambda": 0})),
                (f"plain, top-{K} mass measured", dict(base, k=K, reg="tail", **{"lambda": 0})),
                ("tail", dict(base, k=K, reg="tail", **{"lambda": 0.1})),
                ("kl", dict(base, k=K, reg="kl", **{"lambda": 0.1}))]
        if [row["name"] for row in read_json(final, SPEED) or []] == [name for name, _ in ways]:
            return
        print("measuring the speed and memory of training", flush=True)
        rows = {name: {"ms": [], "tok_s": []} for name, _ in ways}
        for _ in range(self.plan["rounds"]):
            for name, cell in ways:
                folder = self.path("speed")
                shutil.rmtree(folder, ignore_errors=True)
                os.makedirs(folder)
                command = train_command(plan, self.programs, cell, from_root(folder))
                command[command.index("-v") + 1] = command[command.index("-n") + 1] = "0"
                said = self.run_alone(command, "speed", f"speed of {name}")
                if said is None:
                    continue
                head, updates, _ = read_metrics(folder)
                memory = re.search(r"^\s*memory\s+([^,\n]+),", said, re.M)
                row = rows[name]
                row["ms"].append(median([u["ms"] for u in updates[3:]]))
                row["tok_s"].append(median([u["tok_s"] for u in updates[3:]]))
                row.update({"memory": memory and memory.group(1), "commit": head["commit"], "device": head["device"],
                            "command": shlex.join(command)})
        shutil.rmtree(self.path("speed"), ignore_errors=True)
        write_json(final, [dict(row, name=name) for name, row in rows.items() if row["ms"]])

    def decode(self, cells):
        """Tokens a second of generating until the context is nearly full; DIR/decode.json."""
        final = self.path("decode.json")
        batches = [1] + ([32] if self.plan["gpu"] else [])
        wanted = {(c["name"], attention, batch) for c in cells for attention in ("dense", "topk", "pages")
                  for batch in batches}
        if {(r["run"], r["attention"], r["batch"]) for r in read_json(final, DECODE) or []} == wanted:
            return
        print("measuring the speed of decoding", flush=True)
        prompts = self.path("prompts.txt")
        rows = {}
        for _ in range(self.plan["rounds"]):
            for cell in cells:
                for attention in ("dense", "topk", "pages"):
                    for batch in batches:
                        with open(prompts, "w", encoding="utf-8") as file:
                            file.write("The king\n" * batch)
                        command = [self.programs.infer, "-e", self.model(cell), "-f", from_root(prompts), "-n",
                                   str(self.plan["context"] - 16), "--greedy", "--attention", attention,
                                   "--context-full", "stop", *(["-k", str(K)] if attention == "topk" else [])]
                        said = self.run_alone(command, "decode", f"decoding of {cell['name']}")
                        found = re.search(r"then ([0-9.]+) tokens/s", said or "")
                        if found:
                            key = (cell["name"], attention, batch)
                            row = rows.setdefault(key, {"run": cell["name"], "attention": attention, "batch": batch,
                                                        "tok_s": [], "command": shlex.join(command)})
                            row["tok_s"].append(float(found.group(1)))
        write_json(final, list(rows.values()))
