"""The parametrizations of the papers, as exponents of the width over the base width; columns are (input, hidden, output).

`n` is the width, `m` the depth, both as ratios to the base's. A hidden learning rate for SGD in muP is fan_out / fan_in, which is 1
where both grow alike.
"""

from paperjax.parametrization.abc import Depth, Exponent, abc

_ASPECT = Exponent(fan_in=1.0, fan_out=-1.0)

standard = abc(
    "SP", a=(0, 0, 0), b=(0, 0.5, 0.5), c_sgd=(0, 0, 0), c_adam=(0, 0, 0), eps=(0.5, Exponent(fan_out=0.5), 0),
    source="standard practice: variance 1/fan_in, one learning rate",
)  # fmt: skip

standard_full_align = abc(
    "SP, full alignment", a=(0, 0, 0), b=(0, 0.5, 0.5), c_sgd=(-0.5, 0.5, 1), c_adam=(0, 1, 1), eps=(0.5, Exponent(fan_out=0.5), 0),
    source="Everett et al., arXiv 2407.05872, Table 1",
)  # fmt: skip

ntp = abc(
    "NTP", a=(0, 0.5, 0.5), b=(0, 0, 0), c_sgd=(0, 0, 0), c_adam=(0, 0.5, 0.5), eps=(0.5, Exponent(0.5, 0.5), 0.5),
    source="Jacot et al., arXiv 1806.07572; Tensor Programs IV, arXiv 2011.14522, Table 1",
)  # fmt: skip

mean_field = abc(
    "MFP", a=(0, 0.5, 1), b=(0, 0, 0), c_sgd=(-1, Exponent(fan_out=-1.0), -1), c_adam=(0, 0.5, 0), eps=(1, Exponent(0.5, 1.0), 1),
    attention=1.0, source="mean-field parametrization; Tensor Programs IV, arXiv 2011.14522, Table 1",
)  # fmt: skip

mup = abc(
    "muP", a=(0, 0, 0), b=(0, 0.5, 1), c_sgd=(-1, _ASPECT, 1), c_adam=(0, 1, 1), eps=(1, Exponent(fan_out=1.0), 0), attention=1.0,
    source="Tensor Programs V, arXiv 2203.03466, Table 3",
)  # fmt: skip

mup_table8 = abc(
    "muP, Table 8", a=(0, 0, 1), b=(0, 0.5, 0), c_sgd=(-1, _ASPECT, -1), c_adam=(0, 1, 0), eps=(1, Exponent(fan_out=1.0), 1), attention=1.0,
    source="Tensor Programs V, arXiv 2203.03466, Table 8",
)  # fmt: skip

mup_table9 = abc(
    "muP, Table 9", a=(-0.5, 0, 0.5), b=(0.5, 0.5, 0.5), c_sgd=(0, _ASPECT, 0), c_adam=(0.5, 1, 0.5),
    eps=(0.5, Exponent(fan_out=1.0), 0.5), attention=1.0, source="Tensor Programs V, arXiv 2203.03466, Table 9; Tensor Programs IV",
)  # fmt: skip

depth_mup = mup.with_depth(0.5, "Depth-muP", source="Tensor Programs VI, arXiv 2310.02244; also arXiv 2309.16620")

completep = mup_table8.with_depth(1.0, "CompleteP", source="arXiv 2505.01618, Table 1")

# Written in whole fans, one formula for every leaf: sigma = min(1, sqrt(n_out / n_in)) / sqrt(n_in), lr n_out / n_in and 1 / n_in.
# Equal to muP where all widths grow alike, with widths no smaller than the finite fans beside them.
_SIGMA = Exponent(fan_in=0.5, aspect=0.5)
_EACH_IN, _EACH_OUT = Exponent(fan_in=1.0), Exponent(fan_out=1.0)
spectral = abc(
    "spectral", a=(0, 0, 0), b=(_SIGMA, _SIGMA, _SIGMA), c_sgd=(_ASPECT, _ASPECT, _ASPECT), c_adam=(_EACH_IN, _EACH_IN, _EACH_IN),
    eps=(_EACH_OUT, _EACH_OUT, _EACH_OUT), attention=1.0,
    source="A Spectral Condition for Feature Learning, arXiv 2310.17813, Parametrization 1",
)  # fmt: skip

# The paper trains with Adam; for SGD it is muP shifted to unit initialization. The embedding's 1/sqrt(fan_out) is the paper's departure
# from muP.
u_mup = abc(
    "u-muP", a=(0, 0.5, 1), b=(0, 0, 0), c_sgd=(-1, Exponent(fan_out=-1.0), -1), c_adam=(0.5, 0.5, 0), eps=(1, Exponent(0.5, 1.0), 1),
    attention=1.0, depth=Depth(0.5), source="u-muP, arXiv 2407.17465, Table 2",
)  # fmt: skip

wd_layerwise = abc(
    "layerwise weight decay", a=(0, 0, 1), b=(0, 0.5, 0), c_sgd=(-1, _ASPECT, -1), c_adam=(0, 1, 0), eps=(1, Exponent(fan_out=1.0), 1),
    decay=(0, Exponent(fan_in=-0.5), 0), no_decay=("input", "output"), attention=1.0, source="arXiv 2510.15262",
)  # fmt: skip
