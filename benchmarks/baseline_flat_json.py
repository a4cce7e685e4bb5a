"""What one would build instead in an afternoon: FastAPI over a FAISS flat index, called per request with JSON lists.

`python -m benchmarks.baseline_flat_json references.npy` serves float32 rows [n, d] on a free port of loopback and
prints it. It has no permits, no batches across requests, no audit, no durability and no authority: it is here to be
compared with, and as quick as such a thing is.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel

DEPTH_MAX = 100


class Question(BaseModel):
    templates: list[list[float]]
    threshold: float
    rank_max: int = 1


def app_over(stored: NDArray[np.float32]) -> FastAPI:
    """POST /search: for each template the rows at or above the threshold, best first, with their scores."""
    index = faiss.IndexFlatIP(stored.shape[1])
    index.add(stored)
    app = FastAPI()

    @app.post("/search")
    def search(question: Question) -> list[list[dict[str, Any]]]:
        templates = np.array(question.templates, np.float32)
        faiss.normalize_L2(templates)
        scores, rows = index.search(templates, min(question.rank_max, DEPTH_MAX))
        return [
            [
                {"reference_id": f"r{row}", "score": float(score)}
                for score, row in zip(some_scores, some_rows, strict=True)
                if row >= 0 and score >= question.threshold
            ]
            for some_scores, some_rows in zip(scores, rows, strict=True)
        ]

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("references", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of FAISS, in each request")
    args = parser.parse_args()
    faiss.omp_set_num_threads(args.threads)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app_over(np.load(args.references)), log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
