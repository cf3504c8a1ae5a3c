"""What the lecture notes print wrongly, and what is right: facts, in our own words.

``ERRATA["E7"]`` is one erratum. A claim names those that concern it, and the report prints
them beside its result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Erratum:
    """One mistake of the notes.

    Attributes:
        id: ``"E7"``.
        where: The section of the notes.
        printed: What stands there.
        correct: What is right, and why.
        claims: The claims it touches.
    """

    id: str
    where: str
    printed: str
    correct: str
    claims: tuple[str, ...] = ()

    def record(self) -> dict[str, object]:
        """The entry of claims.json."""
        return {**asdict(self), "claims": list(self.claims)}


_ALL = (
    Erratum(
        "E1",
        "§6.1",
        "Every stationary point of a linear ResNet is a global minimum.",
        "Only inside the ball max ‖A_i‖ ≤ τ < 1 (Hardt & Ma 2017, Theorem 2.2). A_i = −I with two or more "
        "layers is stationary and not a minimum.",
        ("C2",),
    ),
    Erratum(
        "E2",
        "§6.1",
        "A linear network is a matrix product, so its local minima are global.",
        "The conclusion does not follow: the loss in the factors is non-convex and has many saddles. It "
        "is a theorem with conditions (Baldi & Hornik 1989, Kawaguchi 2016, Laurent & von Brecht 2018).",
        ("C1",),
    ),
    Erratum(
        "E3",
        "§6.1",
        "Averaging parameters within a network raises the loss, hence a saddle between permuted minima.",
        "What is averaged is two permuted parameter vectors, and a high midpoint alone proves no saddle; "
        "the saddle comes from a minimax argument over paths and lies elsewhere.",
        (
            "C6",
            "C7",
        ),
    ),
    Erratum(
        "E4",
        "§6.1",
        "Permuting the neurons of a layer keeps the loss.",
        "Only if incoming weights, biases and outgoing weights are permuted together.",
        ("C5",),
    ),
    Erratum(
        "E5",
        "§6.2",
        "The gradient over all training data is called an approximation.",
        "It is the exact gradient of the training loss and approximates only the population's. The letter "
        "f also stands for the network here and for the objective from §6.2.3 on.",
        ("C8",),
    ),
    Erratum(
        "E6",
        "§6.2.2",
        "SGD converges more slowly because its gradient is noisier.",
        "True per update, and a constant step leaves a noise floor. Per sample processed SGD is usually "
        "faster, which is why it is used (Bottou, Curtis & Nocedal 2018; Efficient BackProp §4.1).",
        ("C11",),
    ),
    Erratum(
        "E7",
        "§6.2.3",
        "x_t = Σ c_{i,t} λ_i v_i, and the same sum with (1 − ηλ_i) after a step.",
        "x_t = Σ c_{i,t} v_i with c_{i,t} = (1 − ηλ_i)^t c_{i,0}; the sum with λ_i is the gradient. As "
        "printed no point with a component where λ_i = 0 can be written. The growth factor is right.",
        (
            "C16",
            "C17",
        ),
    ),
    Erratum(
        "E8",
        "§6.2.3",
        "A component with λ_i < 0 grows every iteration, so SGD escapes saddles.",
        "It grows only if c_{i,0} ≠ 0. The derivation is for gradient descent, which never leaves the "
        "stable manifold; noise supplies c_{i,0} if it has a part in that direction. Components with λ_i "
        "> 2/η grow too: that is divergence.",
        (
            "C14",
            "C17",
        ),
    ),
    Erratum(
        "E9",
        "§6.3.1",
        "The sum over j has ∇f(x_t) as its summand, three times.",
        "The summand is the gradient at x_j. As printed the sum is (t − 1)(∇f(x_t))² and holds no history.",
        (
            "C21",
            "C22",
        ),
    ),
    Erratum(
        "E10",
        "§6.3.1",
        "The sum of squared gradients runs to t − 1.",
        "It runs to t (Duchi, Hazan & Singer 2011). With t − 1 the first step divides by zero; RMSProp "
        "and Adam in the same notes include the current gradient.",
        ("C22",),
    ),
    Erratum(
        "E11",
        "§6.3.1",
        "The step uses G_t⁻¹.",
        "It uses (δI + G_t)⁻¹: a coordinate that never saw a gradient has G_ii = 0.",
        ("C22",),
    ),
    Erratum(
        "E12",
        "§6.3.1–6.3.3",
        "(∇f(x_t)_ii)² in AdaGrad, RMSProp and Adam.",
        "(∇f(x_t)_i)²: a gradient has one index.",
        (
            "C22",
            "C25",
            "C28",
        ),
    ),
    Erratum(
        "E13",
        "§6.3.2",
        "(G_t)_ii⁻¹ increases with t because a positive quantity is added.",
        "G_ii increases, so its inverse and the rate decrease, as the next sentence of the notes assumes.",
        ("C24",),
    ),
    Erratum(
        "E14",
        "§6.3.2–6.3.3",
        "Sums and averages of norms of the gradients in each component.",
        "A sum (AdaGrad) or a weighted average (RMSProp, Adam) of squared gradient components.",
        (
            "C25",
            "C26",
            "C28",
        ),
    ),
    Erratum(
        "E15",
        "§6.3.3, title",
        "AdaGrad + momentum = Adam.",
        "RMSProp + momentum, both weighted averages, + bias correction. AdaGrad is a limit: β₁ = 0 and β₂ "
        "→ 1 with α_t ∝ t^(−1/2) (Kingma & Ba §5), or β₂ = 1 − 1/t (Reddi, Kale & Kumar 2018, Corollary "
        "2).",
        ("C28",),
    ),
    Erratum(
        "E16",
        "§6.3.3",
        "Adam's update without bias correction and without ε.",
        "m̂ = m/(1 − β₁^t), v̂ = v/(1 − β₂^t), and √v̂ + ε below. Without the correction and with the "
        "default β the step under a constant gradient is 3.16 η at first, peaks at 6.57 η at t = 12, and "
        "is 0/0 at a zero gradient.",
        ("C28",),
    ),
    Erratum(
        "E17",
        "§6.3.2",
        "RMSProp without ε and without a source.",
        "+ ε in the denominator; Tieleman & Hinton 2012, lecture 6e, with decay 0.9.",
        ("C25",),
    ),
    Erratum(
        "E18",
        "§6.4.1",
        "Normalising or whitening gives mean 0 and variance 1.",
        "That is standardisation; whitening also removes the correlations.",
        (
            "C33",
            "C34",
        ),
    ),
    Erratum(
        "E19",
        "§6.4.1",
        "A discovery of 1998, cited with the year 2012.",
        "The original is LNCS 1524 (1998), 2012 is its reprint; the effect was analysed in LeCun, Kanter "
        "& Solla 1991.",
        ("C33",),
    ),
    Erratum(
        "E20",
        "§6.4.1",
        "γ and β shift the distribution back to the linear regime.",
        "The opposite: normalisation alone would hold a sigmoid in its linear regime, and γ, β let the "
        "layer represent the identity (Ioffe & Szegedy 2015 §3).",
        ("C46",),
    ),
    Erratum(
        "E21",
        "§6.3.3",
        "Adam's convergence is described as unproved, with a reference of 2019.",
        "Adam provably fails to converge on convex online and stochastic problems built for given β₁, β₂; "
        "the paper is of ICLR 2018. Its theorems are not about one fixed deterministic convex function, "
        "and a β₂ large enough for the problem restores convergence (Zhang et al. 2022).",
        (
            "C31",
            "C32",
        ),
    ),
    Erratum(
        "E22",
        "§6.3",
        "Indices and signs change from rule to rule.",
        "One convention: g_t the gradient at x_t; m_t and v_t include g_t; x_{t+1} = x_t − α m̂_t/(√v̂_t "
        "+ ε) per component. The notes' G_t stops at t − 1, their v lacks the index i in a scalar update, "
        "their Polyak v carries −∇f and is added while their Adam v carries +∇f and is subtracted, and "
        "their g is a second moment.",
        (
            "C22",
            "C25",
            "C27",
            "C28",
        ),
    ),
    Erratum(
        "E23",
        "§6.4.2",
        "Batch normalisation brings every layer to one distribution with mean 0 and variance 1 and so "
        "removes internal covariate shift.",
        "It sets two moments, per unit and mini-batch, before γ and β. The shift measured on gradients is "
        "not reduced and can rise (Santurkar et al. 2018 §2).",
        (
            "C41",
            "C50",
        ),
    ),
    Erratum(
        "E24",
        "§6.4.2",
        "The better Hessian is proved for one-layer linear nets in [8].",
        "[8] is older than batch normalisation; it shows that a linear unit's Hessian is the inputs' "
        "second-moment matrix, so centring and scaling help.",
        ("C42",),
    ),
    Erratum(
        "E25",
        "§6.4.1",
        "At test time: the global mean and standard deviation over batches.",
        "The mean of the batch means and the unbiased m/(m−1) times the mean batch variance, or moving "
        "averages.",
        ("C44",),
    ),
    Erratum(
        "E26",
        "§6.4.2",
        "Gaussian noise after batch normalisation undoes what it did.",
        "The noise has non-zero mean and non-unit variance, redrawn each step and unit. It does not undo "
        "the projection of the gradient or the scale invariance.",
        ("C48",),
    ),
    Erratum(
        "E27",
        "§6.4.2, §6.5",
        "The active regime is the linear regime.",
        "Active means a derivative away from 0. Exactly linear units would make the network linear.",
        (
            "C40",
            "C53",
        ),
    ),
    Erratum(
        "E28",
        "§6.5.1",
        "Var tanh(y) ≈ 1 when Var y = 1, because the slope is about 1.",
        "It is 0.394 for a Gaussian y; the slope is near 1 only for |y| ≪ 1.",
        ("C57",),
    ),
    Erratum(
        "E29",
        "§6.5.2",
        "The uniform interval begins at √(−6)/√(fan-in + fan-out).",
        "It begins at −√6/√(fan-in + fan-out).",
        ("C60",),
    ),
    Erratum(
        "E30",
        "§6.5.2",
        "The variance is kept forward and backward.",
        "Both only when fan-in = fan-out; otherwise the factors are 2n_in/(n_in + n_out) and 2n_out/(n_in "
        "+ n_out).",
        ("C59",),
    ),
    Erratum(
        "E31",
        "§6.5.1",
        "Outputs keep mean 0 and variance 1 through every layer.",
        "Means stay 0; with tanh the variance decays like 1/(2l) in depth l.",
        ("C58",),
    ),
    Erratum("E32", "§6.6.1", "Cites [7, 4, 1].", "[7] is Adam; meant is Garipov et al. 2018.", ("C62",)),
    Erratum(
        "E33",
        "References",
        "Garipov et al., Kawaguchi, Hardt & Ma, Polyak, Tieleman & Hinton are not listed.",
        "Their results are used and should be cited.",
    ),
    Erratum(
        "E34",
        "§6.6.2",
        "Repeat steps 2 and 3: prune, reset.",
        "Repeat train, prune, reset; without training the second pruning would rank initial weights.",
        ("C65",),
    ),
    Erratum(
        "E35",
        "§6.6.2",
        "Subnetworks of 15 % down to 1 % of the original size.",
        "The paper's abstract says less than 10–20 %; LeNet tickets match down to 3.6 %.",
        ("C67",),
    ),
    Erratum("E36", "Figures", "Two figures are numbered 6.1.", "The saddle, and tanh (§6.5.1)."),
    Erratum(
        "E37", "Figures", "Two figures are numbered 6.2.", "The batch-norm layer, and mode connectivity."
    ),
    Erratum("E38", "Figures", "Two figures are numbered 6.3.", "Training curves, and isolated solutions."),
    Erratum(
        "E39", "Figures", "Two figures are numbered 6.5.", "The noise histogram, and the accuracy curve."
    ),
    Erratum(
        "E40",
        "§6.1, §6.6.1",
        "Minima are isolated (§6.1) and connected by flat paths (§6.6.1).",
        "They are isolated only where the network has no spare capacity.",
        (
            "C6",
            "C62",
            "C64",
        ),
    ),
    Erratum(
        "E41",
        "§6.3, title",
        "AdaGrad, RMSProp and Adam as second-order methods.",
        "They use first-order information; their diagonal is the root of a sum or average of squared "
        "gradients, not an estimate of the Hessian.",
        ("C21",),
    ),
    Erratum(
        "E42",
        "References",
        "Years of preprints and reprints.",
        "[8] is of 1998; [9] ICLR 2018; [1] ICML 2018; [3] ICLR 2019; [4] ICLR 2017; [7] ICLR 2015.",
    ),
    Erratum(
        "E43",
        "§6.2, §6.2.1",
        "Picking a random sample and cycling through all batches are presented as one thing.",
        "They are different schemes: with replacement every draw is unbiased given the past; without, a "
        "later batch of an epoch depends on the earlier ones.",
        (
            "C8",
            "C10",
        ),
    ),
    Erratum(
        "E44",
        "§6.5.1",
        "E[y] = 0 by linearity, and variances add by independence.",
        "The first also needs w independent of x; for the second uncorrelated terms are enough.",
        ("C55",),
    ),
)

ERRATA: dict[str, Erratum] = {erratum.id: erratum for erratum in _ALL}
