"""Rows of the seven tasks, words of texts, and scores, for evaluations of tiny models."""

import json

from olica.evaluation import zero_shot
from olica.evaluation.settings import EvaluationSettings

WORDS = "seven wise owls read old books by candle light and hoot at every quick brown fox".split()

CHOICES = {"text": ["a wet stone", "the sun", "ice"], "label": ["A", "B", "C"]}
SCIENCE = {"id": "1", "question": "What warms the sea?", "choices": CHOICES, "answerKey": "B"}
ACTIVITY = {"ind": 1, "activity_label": "Baking", "source_id": "x", "split": "val", "split_type": "indomain"}

# One row per task, in the fields of its data set.
ROWS = {
    "openbookqa_main_test": {
        "id": "1",
        "question_stem": "The sea is warmed by",
        "choices": CHOICES,
        "answerKey": "B",
    },
    "arc_easy_test": SCIENCE,
    "arc_challenge_test": SCIENCE | {"question": "What cools the sea?", "answerKey": "C"},
    "winogrande_xl_validation": {
        "sentence": "The cup did not fit the box as _ was wide.",
        "option1": "the cup",
        "option2": "the box",
        "answer": "1",
    },
    "hellaswag_validation": ACTIVITY
    | {
        "ctx_a": "A man opens an oven.",
        "ctx_b": "he",
        "ctx": "A man opens an oven. he",
        "endings": ["takes the [step] bread.", "sings.", "is an oven.", "leaves through it."],
        "label": "0",
    },
    "piqa_validation": {"goal": "Dry a cup.", "sol1": "Wipe it.", "sol2": "Fill it.", "label": 0},
    "boolq_validation": {"question": "is ice cold", "passage": "Ice -- Ice is cold.", "idx": 0, "label": 1},
}


def write_rows(folder, stem, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def score(model, tokenizer, tasks, data_dir, batch_size=3, **settings):
    """The scores of all tasks together, and their averages."""
    asked = EvaluationSettings(data_dir=data_dir, batch_size=batch_size, **settings)
    scores = {}
    for _, of_task in zero_shot.zero_shot(model, tokenizer, tasks, asked):
        scores |= of_task
    return {"tasks": scores, "averages": zero_shot.averages(scores)}
