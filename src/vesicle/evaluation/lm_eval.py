"""The public door to the lm-evaluation-harness, see `vesicle.integrations.lm_eval.model`.

    python -m vesicle.evaluation.lm_eval --model vesicle --model_args budget=0.8 --tasks ...

From Python, importing this module registers the model `vesicle`.
"""

import sys

try:
    from vesicle.integrations.lm_eval.model import NAME, USER_ERROR, VesicleLM, main
except ModuleNotFoundError as error:
    if __name__ != "__main__" or error.name != "lm_eval":
        raise
    print(f"vesicle: error: {error}", file=sys.stderr)
    sys.exit(2)

__all__ = ["NAME", "USER_ERROR", "VesicleLM", "main"]

if __name__ == "__main__":
    sys.exit(main())
