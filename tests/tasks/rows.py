"""Rows of every data set's task: as the hub has them, and in the local format."""

import gzip
import json
from pathlib import Path
from typing import Any

from vesicle.tasks.base import Settings

SETTINGS = Settings(seed=0, encode=lambda text: list(text.encode()))

HUB: dict[str, list[dict[str, Any]]] = {
    "squad": [
        {
            "id": "5733be28",
            "title": "Harbour",
            "context": "The harbour froze in 1709.",
            "question": "When did it freeze?",
            "answers": {"text": ["1709", "in 1709", "1709"], "answer_start": [21, 18, 21]},
        }
    ],
    "race": [
        {
            "example_id": "high7.txt",
            "article": "Ann reads.",
            "answer": "C",
            "question": "Ann   _  .",
            "options": ["runs", "eats", "reads", "sings"],
        },
        {
            "example_id": "high7.txt",
            "article": "Ann reads.",
            "answer": "A",
            "question": "Who reads?",
            "options": ["Ann", "Bob", "Cid", "Dan"],
        },
        {
            "example_id": "middle3.txt",
            "article": "Bob sings.",
            "answer": "D",
            "question": "Who sings?",
            "options": ["Ann", "Cid", "Dan", "Bob"],
        },
    ],
    "cnn_dailymail": [{"id": "c0ffee", "article": "It rained. ", "highlights": "Rain .\nMore ."}],
    "wikitext2": [{"text": ""}, {"text": " = Tea = \n"}, {"text": ""}, {"text": " A drink . \n"}],
    "wikitext103": [{"text": ""}, {"text": " = Sea = \n"}, {"text": ""}, {"text": " Salty . \n"}],
    "wmt14_en_de": [{"translation": {"de": "Ein Haus.", "en": "A house."}}],
    "arxiv": [{"article": "we test tea .", "abstract": "tea is warm ."}],
    "longbench": [
        {
            "input": "Who {sings}?",
            "context": "Bob sings.",
            "answers": ["Bob"],
            "length": 2,
            "dataset": "qasper",
            "language": "en",
            "all_classes": None,
            "_id": "abc",
        }
    ],
}

LOCAL: dict[str, list[dict[str, Any]]] = {
    "squad": [
        {
            "id": "a",
            "context": "The harbour froze in 1709.",
            "question": "When did it freeze?",
            "answers": ["1709", "in 1709"],
        }
    ],
    "race": [
        {
            "id": "high7-0",
            "article": "Ann reads.",
            "answer": 2,
            "question": "Ann   _  .",
            "options": ["runs", "eats", "reads", "sings"],
            "level": "high",
        }
    ],
    "cnn_dailymail": HUB["cnn_dailymail"],
    "wikitext2": [{"title": "Tea", "text": " \n = Tea = \n \n A drink . \n"}],
    "wikitext103": [{"title": "Sea", "text": " \n = Sea = \n \n Salty . \n"}],
    "wmt14_en_de": [{"id": "n-1", "en": "A house.", "de": "Ein Haus."}],
    "arxiv": [{"id": "2212.1", "article": "we test tea .", "abstract": "tea is warm ."}],
    "longbench": HUB["longbench"],
}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON Lines, compressed if the name says so; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path
