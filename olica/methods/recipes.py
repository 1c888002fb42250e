"""The table of methods."""

from functools import partial

from . import shares, value_output
from .flap import flap
from .let_llm_tell import TellParameters, let_llm_tell
from .lorap import lorap
from .magnitude import magnitude
from .modegpt import ModegptParameters, modegpt
from .olica import OlicaParameters, paper, released
from .osscar import OsscarParameters, osscar
from .plus import PlusParameters, plus, plus_of_units
from .recipe import NoParameters, Recipe, Text
from .slimgpt import SlimGPTParameters, slimgpt
from .slimllm import SlimParameters, slimllm
from .value_output import FactorisedProjections, NarrowedHeads
from .wanda_sp import wanda_sp


def _beside(directions) -> NarrowedHeads:
    """The released value/output stage with other directions."""
    return NarrowedHeads(directions, value_output.released_importance)


RECIPES = {
    row.name: row
    for row in (
        Recipe("olica", "Olica, ICML 2025: the released code's arithmetic", OlicaParameters, released),
        Recipe(
            "olica-grouped",
            "Olica with shares of ours: keys stay dense where heads are grouped",
            OlicaParameters,
            partial(released, rule=shares.grouped_sparsities),
        ),
        Recipe(
            "olica-paper",
            "Olica, ICML 2025, as the text has it: equations 4 to 11, Algorithm 1, Appendix A",
            OlicaParameters,
            paper,
        ),
        # What the paper compares Fast-OND with, everything else being equal: full OND (Table 6); SVD, SVD weighted by
        # the inputs' norms, and importance without any decomposition (Table 5).
        Recipe(
            "olica-ond",
            "Olica with full OND in place of Fast-OND (Table 6)",
            OlicaParameters,
            partial(released, value_heads=_beside(value_output.product_directions)),
        ),
        Recipe(
            "olica-svd",
            "Olica with value and output factorised by SVD (Table 5)",
            OlicaParameters,
            partial(released, value_heads=FactorisedProjections(by_input=False)),
        ),
        Recipe(
            "olica-awsvd",
            "Olica with value and output factorised by SVD weighted by the inputs (Table 5)",
            OlicaParameters,
            partial(released, value_heads=FactorisedProjections(by_input=True)),
        ),
        Recipe(
            "olica-wanda",
            "Olica with value heads pruned without a decomposition (Table 5)",
            OlicaParameters,
            partial(released, value_heads=_beside(value_output.given_directions)),
        ),
        Recipe(
            "olica-plus",
            "Olica with refits by least squares and sizes by what they damage",
            PlusParameters,
            plus,
            plus_of_units,
            # Web text alone did better on other web text and on an encyclopaedia than mixes with prose, instructions
            # and code, more of it better, and best of all that of the most different tokens: docs/measurements.md.
            text=Text("c4", 768, candidates=8),
        ),
        Recipe("magnitude", "magnitude: the smallest heads and channels go, by one threshold", NoParameters, magnitude),
        Recipe(
            "flap",
            "FLAP, AAAI 2024: what fluctuates least goes, biases take up its mean",
            NoParameters,
            flap,
        ),
        Recipe(
            "wanda-sp",
            "Wanda-sp, after Wanda, ICLR 2024: the same share of heads and channels by size times input norm",
            NoParameters,
            wanda_sp,
        ),
        Recipe(
            "lorap",
            "LoRAP, ICML 2024: attention by low-rank factors weighted by inputs, MLPs by L2 norms of Wanda's scores",
            NoParameters,
            lorap,
        ),
        Recipe(
            "modegpt",
            "MoDeGPT, ICLR 2025: Nystrom approximation of MLPs, SVD of value and output, ratios by block influence",
            ModegptParameters,
            modegpt,
        ),
        Recipe(
            "slimgpt",
            "SlimGPT, NeurIPS 2024: what a refit makes up for best goes, more of it in later layers",
            SlimGPTParameters,
            slimgpt,
        ),
        Recipe(
            "osscar",
            "OSSCAR, ICML 2024: what a refit makes up for best goes, then exchanges while the error falls",
            OsscarParameters,
            osscar,
        ),
        Recipe(
            "let-llm-tell",
            'after "Let LLM Tell What to Prune", ICML 2025: ratios by transfer entropy; how it is estimated is ours',
            TellParameters,
            let_llm_tell,
        ),
        Recipe(
            "slimllm",
            "SlimLLM, ICML 2025: heads by redundancy, channels by principal outputs, every output regressed",
            SlimParameters,
            slimllm,
        ),
    )
}
