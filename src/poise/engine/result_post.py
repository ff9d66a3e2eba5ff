"""Results of all ranks on their way to rank 0, over the ranks' store, as each request finishes.

A rank posts and tells in its next agreement how many it has posted; rank 0 then fetches exactly those. So a run that is
interrupted keeps what was finished anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from poise.engine.request import Completion, RequestOutput
from poise.parallel.group import RankGroup


class ResultPost:
    """One call's results. ``posted``: how many this rank has posted."""

    def __init__(self, group: RankGroup, *, call: int) -> None:
        self._group = group
        self._call = call
        self._fetched_R = [0] * group.num_ranks
        self.posted = 0

    def post(self, result: RequestOutput) -> None:
        """Sends a result to rank 0."""
        self._group.put(self._key(self._group.rank, self.posted), json.dumps(_plain(result)))
        self.posted += 1

    def fetch(self, posted_R: Sequence[int]) -> list[RequestOutput]:
        """On rank 0: what has been posted since the last time, given how many results each rank has posted in all."""
        results = []
        for rank, posted in enumerate(posted_R):
            for number in range(self._fetched_R[rank], posted):
                results.append(_result(json.loads(self._group.take(self._key(rank, number)))))
            self._fetched_R[rank] = posted
        return results

    def _key(self, rank: int, number: int) -> str:
        return f"result/{self._call}/{rank}/{number}"


def _plain(result: RequestOutput) -> dict[str, Any]:
    """Without the prompt: rank 0 has it."""
    outputs = [
        {"text": each.text, "token_ids": each.token_ids, "finish_reason": each.finish_reason} for each in result.outputs
    ]
    return {"index": result.index, "prompt_token_ids": result.prompt_token_ids, "outputs": outputs}


def _result(content: dict[str, Any]) -> RequestOutput:
    outputs = tuple(
        Completion(text=each["text"], token_ids=tuple(each["token_ids"]), finish_reason=each["finish_reason"])
        for each in content["outputs"]
    )
    return RequestOutput(
        index=content["index"], prompt=None, prompt_token_ids=tuple(content["prompt_token_ids"]), outputs=outputs
    )
