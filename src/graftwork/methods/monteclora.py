"""MonteCLoRA (arXiv 2411.04358): LoRA; in training A + sum_n w_n E_n, noise E_n from a Wishart
Gaussian, weights w from a Dirichlet, both learned and held to their priors by a penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from ..engine import Site
from .lora import LoRA, fixed_rank
from .lora_config import LoraConfig

KEYS = {"std": "std_prior", "logits": "expert_weights_prior", "var": "gaussian_var_prior",
        "w": "expert_weights"}  # fmt: skip


class MonteCLoRA(LoRA):
    """std (r,) and logits (n,) train, as logarithms; var (r, r) and w (n,) note the last draw."""

    stacked = False
    pad = fixed_rank

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.options = config.monteclora_config
        sampler = {name: f"lora_monteclora_sampler.{key}" for name, key in KEYS.items()}
        self.keys = {**self.keys, **sampler}
        n = self.options.num_samples
        self.std, self.logits = nn.Parameter(torch.empty(self.r)), nn.Parameter(torch.empty(n))
        self.var = nn.Buffer(torch.eye(self.r))
        self.w = nn.Buffer(torch.full((n,), 1 / n))
        self.chi = nn.Buffer(torch.full((self.r,), float(self.r)), persistent=False)
        self.z = nn.Buffer(torch.zeros(n), persistent=False)

    def start(self, site: Site) -> None:
        super().start(site)
        self.std.uniform_()
        self.logits.uniform_()

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = super().factors()
        if not (self.training and torch.is_grad_enabled()):
            return a, b
        self.draw()
        # sum_n w_n E_n is one Gaussian with ||w|| times the deviation of each
        noise = torch.randn_like(self.A.flatten(1)) * self.spread().sqrt()[:, None]
        noise = self.options.sample_scaler * self.weights().norm() * noise
        rest = noise.new_zeros(len(a) - self.r, noise.shape[1])  # a start that is taken away
        return a + torch.cat([noise, rest]), b

    @torch.no_grad()
    def draw(self) -> None:
        """The diagonal of a Wishart matrix of r degrees of freedom is chi-squared."""
        self.chi.copy_(torch.randn(self.r, self.r, device=self.chi.device).square().sum(1))
        self.z.normal_()
        self.var.copy_(self.spread().diag())
        self.w.copy_(self.weights())

    def spread(self) -> Tensor:
        """The variances of A's rows (r,)."""
        return (self.std.exp().square() * self.chi).clamp(min=1e-3)

    def weights(self) -> Tensor:
        """A Dirichlet's Laplace approximation, (n,)."""
        alpha, n = self.logits.exp().clamp(min=1e-6), len(self.logits)
        var = (1 - 2 / n) / alpha + (1 / alpha).sum() / n**2
        logits = alpha.log() - alpha.log().mean() + (var.clamp(min=1e-6) + 1e-6).sqrt() * self.z
        return logits.softmax(-1)

    def divergence(self) -> Tensor:
        """The KL divergences from the Dirichlet, the Wishart and the Gaussian prior."""
        alpha, prior = self.logits.exp(), torch.full_like(self.logits, self.options.dirichlet_prior)
        dirichlet = kl_divergence(*(Dirichlet(p, validate_args=False) for p in (alpha, prior)))
        square, var = self.std.exp().square(), self.spread()
        wishart = 0.5 * self.r * (square - square.log() - 1).sum()
        gaussian = 0.5 * len(self.logits) * (var - var.log() - 1).sum()
        total: Tensor = dirichlet + wishart + gaussian
        return total

    @staticmethod
    def penalty(adapters: Sequence[MonteCLoRA], config: LoraConfig) -> Tensor:
        """The mean over the layers."""
        options = config.monteclora_config
        terms = [
            options.kl_loss_weight * one.divergence()
            + (one.weights().square().sum() if options.use_entropy else 0)
            for one in adapters
        ]
        return torch.stack(terms).mean()
