"""
The paper's nine tasks for whoever has the files: read in the layouts, asked in the words and scored by the rules of the
EleutherAI harness (github.com/EleutherAI/lm-evaluation-harness, version 0.4).

    python -m real M --task arc_easy=ARC-Easy-Test.jsonl --task lambada=lambada_test.jsonl

A task is told by the beginning of its name:

    arc, sciq, piqa, hellaswag   multiple choice: acc, and acc_norm (a character of the option)
    lambada                      the passage's last word, continued greedily: acc, and the perplexity a word
    webqs                        any of the accepted answers, continued greedily: exact_match
    triviaqa                     the generated answer up to a newline, full stop or comma is an alias: exact_match

What it leaves out: few-shot examples, the harness' other tasks, its chat templates.
"""
import json
import math
import re
import string

import numpy as np
import torch

from study.repairs import light
from study.statistics import interval, recall_interval, resampled
from study.steps import digest, slug
from world.facts import Fact, pad
from world.score import check_numbers, choose_option, cut_options, fitting


def arc(row):
    options, labels = texts(row["choices"]["text"]), row["choices"]["label"]
    return f"Question: {row['question']}\nAnswer:", options, labels.index(row["answerKey"])


def sciq(row):
    options = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", options, 3


def piqa(row):
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], whole(row["label"])


def hellaswag(row):
    def clean(text):  # what is left of WikiHow's markup
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")
    question = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(question), [clean(ending) for ending in texts(row["endings"])], whole(row["label"])


def lambada(row):
    question, last = row["text"].rsplit(" ", 1)
    return question, [last], 0


def webqs(row):
    return f"Question: {row['question']}\nAnswer:", texts(row["answers"]), 0


def triviaqa(row):
    return f"Question: {row['question']}?\nAnswer:", texts(row["answer"]["aliases"]), 0


def whole(label):
    """The number of an option, which files write as 1 or "1"; TypeError for any other."""
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError
    return int(label)


def texts(values):
    """A list of texts; TypeError for one text, which would be taken for a list of letters, and for anything else."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError
    return values


SPARE = 4  # tokens that an answer written out may be longer than the longest accepted one
LAYOUTS = {"arc": arc, "sciq": sciq, "piqa": piqa, "hellaswag": hellaswag, "lambada": lambada, "webqs": webqs,
           "triviaqa": triviaqa}


def reader(name):
    """The reader of a task's rows, told by how its name begins."""
    for known, read in LAYOUTS.items():
        if name.lower().startswith(known):
            return read
    raise ValueError(f"the task {name!r} is not known; its name must begin with one of {', '.join(LAYOUTS)}")


def read_task(name, path, check=None):
    """The questions of a task's JSON lines file, as Facts (of webqs and triviaqa, `options` are the accepted answers).

    check  what else a question must pass, raising ValueError (`fits`)
    Raises ValueError with the line's number for a row of another layout, or that does not pass.
    """
    read, questions = reader(name), []
    for number, line in lines_of(path):
        try:
            question, options, gold = read(json.loads(line))
            if not question.strip() or not 0 <= gold < len(options) or not all(o.strip() for o in options):
                raise ValueError
            if read in (arc, sciq, piqa, hellaswag) and len(set(options)) < 2:
                raise ValueError
            options = tuple(" " + option for option in options)
            item = Fact(f"{name} {number}", "", name, question, options[gold], options)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ValueError(f"{path}: line {number} is not in the layout of {read.__name__}") from None
        if check:
            check_line(path, number, check, item)
        questions.append(item)
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions


def lines_of(path):
    """(number, text) of each line of a UTF-8 file that is not blank, a byte-order mark at its beginning left out.

    Raises ValueError that names the line where the file is not UTF-8, or holds a NUL.
    """
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason} at byte {error.start})") from None
            if "\0" in text or "\\u0000" in text:
                raise ValueError(f"{path}: line {number} holds a NUL")
            if text.strip():
                yield number, text


def check_line(path, number, check, item):
    """Run `check(item)`; where it refuses, name the file and the line."""
    try:
        check(item)
    except ValueError as error:
        raise ValueError(f"{path}: line {number}: {error}") from None


def fits(encoding, room):
    """A check for `read_task`: a question and its longest option are cut where the option begins, and are at most
    `room` tokens together.
    """
    def check(item):
        question, options = cut_options(item, encoding, [encoding.eot_token])
        tokens = len(question) + max(map(len, options)) + SPARE
        if tokens > room:
            raise ValueError(f"{tokens} tokens with its longest option and {SPARE} to spare, but the context has room "
                             f"for {room}")
    return check


def read_tasks(tasks, check=None):
    """{name: its questions} of a command line's NAME=FILE arguments."""
    files = {}
    for task in tasks:
        name, _, path = task.partition("=")
        if not path:
            raise ValueError(f"a task is NAME=FILE, got {task!r}")
        if name in files:
            raise ValueError(f"--task {task}: there is a task {name} already; give each file a name of its own")
        files[name] = read_task(name, path, check)
    return files


def score(subject, name, questions, encoding):
    """{metric: one number a question}: 1.0 or 0.0 where it is right; for lambada the last word's loss in nats, too."""
    read = reader(name)
    if read in (arc, sciq, piqa, hellaswag):
        given = choose_option(subject, questions, encoding, start=[])
        return {metric: [float(a[key] == q.gold) for q, a in zip(questions, given)]
                for metric, key in (("acc", "picked"), ("acc_norm", "picked_norm"))}
    if read is triviaqa:
        given = [re.split(r"[\n.,]", encoding.decode(tokens))[0] for tokens in continued(subject, questions, encoding)]
        return {"exact_match": [float(normalized(text) in {normalized(alias) for alias in q.options})
                                for q, text in zip(questions, given)]}
    right = [float(any(tokens[:len(wanted)] == wanted for wanted in accepted(q, encoding)))
             for q, tokens in zip(questions, continued(subject, questions, encoding))]
    if read is webqs:
        return {"exact_match": right}
    losses = [-a["logprobs"][0] for a in choose_option(subject, questions, encoding, start=[])]
    return {"acc": right, "loss": losses}


def accepted(question, encoding):
    """The tokens of each accepted answer behind the question, tokenized together with it."""
    return cut_options(question, encoding, [])[1]


def normalized(text):
    """A text for comparison: no case, no punctuation, no space at its ends."""
    return text.translate(str.maketrans("", "", string.punctuation)).lower().strip()


@torch.no_grad()
def continued(subject, questions, encoding, batch_size=32):
    """The tokens that each question is greedily continued by, up to an end-of-text: as many as its longest accepted
    answer has, and SPARE more.
    """
    cuts, out = [cut_options(q, encoding, []) for q in questions], []
    sizes = [(len(question), SPARE + max(map(len, answers))) for question, answers in cuts]
    for start, end in fitting(sizes, batch_size, subject.room()):
        longest = max(n for _, n in sizes[start:end])
        ids, lengths = pad([question for question, _ in cuts[start:end]], encoding, subject.device)
        _, cache, first = subject.start(ids, lengths, longest)
        last, at = cache.length + lengths - 1, torch.arange(len(ids), device=ids.device)  # (B,) of each question
        given = subject.model.generate(ids, longest, lengths, cache=cache, stop=encoding.eot_token, first=first)
        cache.rewind(last)
        check_numbers(subject, subject.model.head(subject.model.hidden(ids[at, lengths - 1][:, None], cache=cache)))
        for row, (question, n) in zip(given.tolist(), sizes[start:end]):
            tokens = row[question:question + n]
            out.append(tokens[:tokens.index(encoding.eot_token)] if encoding.eot_token in tokens else tokens)
    return out


def reported(metric, values):
    """What is printed of a metric's mean and its bounds: losses become the perplexity a word."""
    return ("perplexity", [math.exp(v) for v in values]) if metric == "loss" else (metric, [float(v) for v in values])


def task_metrics(files):
    """The metrics of task files {task: Questions}: (name, label, unit, higher is better, what it is), each."""
    for name in files:
        read = reader(name)
        kinds = {"lambada": ("acc", "perplexity"), "webqs": ("exact_match",), "triviaqa": ("exact_match",)}
        for metric in kinds.get(read.__name__, ("acc", "acc_norm")):
            share = metric != "perplexity"
            yield f"{name} {metric}", f"{name}, {metric}", "share" if share else "", share, f"the harness' {metric}"


def add_files(run, rows, subjects, files):
    """Every model's score on task files {task: questions}, as metrics "task metric" with an interval over questions."""
    for name, questions in files.items():
        for subject, row in zip(subjects, rows):
            settings = {**subject.about["settings"], "questions": digest(questions)}
            scores = run.once_json(f"{row['id']}.{slug(name)}", settings,
                                   ("study.taskfiles", "compress", "study.repairs"),
                                   lambda: score(light(subject), name, questions, run.world.encoding))
            generator = torch.Generator().manual_seed(run.config.seed + 7)
            for metric, values in scores.items():
                drawn = resampled(np.array(values)[:, None], 10_000, generator)[:, 0]
                low, high = interval(drawn) if metric == "loss" else recall_interval(values, [1] * len(values), drawn)
                metric, (value, low, high) = reported(metric, (np.mean(values), low, high))
                row["metrics"][f"{name} {metric}"], row["intervals"][f"{name} {metric}"] = value, [low, high]
