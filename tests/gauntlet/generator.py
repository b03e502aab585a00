"""Draws random pairs, right ones and wrong ones."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from gauntlet.programs import CONTINUOUS, DISCRETE, FAMILIES, OBSERVED, Pair, Site
from torch import Tensor

SAME_SUPPORT = {
    "real": ("normal", "affine"),
    "reals": ("normals", "mvn"),
    "positive": ("lognormal", "expnormal", "gamma"),
    "unit": ("logitnormal", "beta"),
    "bit": ("bernoulli",),
    "bits": ("bits",),
    "three": ("categorical",),
    "onehot": ("onehot",),
    "upto2": ("binomial",),
}
LISTED = ("bernoulli", "categorical", "onehot", "binomial")  # a vector of bits lists no states
AUTOGUIDES = ("AutoNormal",)
JOINT_AUTOGUIDES = ("AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal")


class _Drawing:
    """One pair being drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.parameters: dict[str, int] = {}

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def number(self, low: float, high: float) -> str:
        return f"{self.random.uniform(low, high):.2f}"

    def parameter(self, letter: str) -> str:
        """A parameter of the model (a) or of the guide (b), new or used before."""
        own = [n for n in self.parameters if n[0] == letter]
        if own and self.chance(0.3):
            return self.random.choice(own)
        self.parameters[f"{letter}{len(own)}"] = 1
        return f"{letter}{len(own)}"

    # -- expressions

    def feature(self, site: Site) -> str:
        """A number read off a site's value."""
        name = site.name
        if site.kind == "deterministic":
            return name
        support = FAMILIES[site.family].support
        if support in ("reals", "bits", "onehot"):
            return f"{name}[..., {self.random.randrange(FAMILIES[site.family].event)}]"
        if support == "positive":
            return self.random.choice((f"{name}.log()", f"torch.tanh({name})"))
        if support == "three" and self.chance(0.5):
            return f"TABLE[{name}.long()]"
        return name

    def real(self, parents: list[Site], letter: str, size: float = 0.9) -> str:
        terms = []
        for site in self.random.sample(parents, min(len(parents), self.random.choice((1, 1, 2)))):
            sign = self.random.choice((-1, 1))
            terms.append(f"{sign * self.random.uniform(0.3, size):.2f} * {self.feature(site)}")
        if self.chance(0.6) or not terms:
            terms.append(self.parameter(letter))
        if letter == "b":
            terms.append(f"{self.number(0.1, 0.5)} * s")
        elif self.chance(0.3):
            terms.append(f"{self.number(0.2, 0.6)} * c")
        return " + ".join(terms)

    def positive(self, parents: list[Site], letter: str) -> str:
        direct = [s for s in parents if s.family and FAMILIES[s.family].support == "positive"]
        if direct and self.chance(0.5):
            return f"{self.number(0.5, 2.0)} * {self.random.choice(direct).name}"
        return f"({self.real(parents, letter, 0.5)}).exp()"

    def argument(self, kind: str, parents: list[Site], letter: str, *, wide: bool) -> str:
        if kind == "r":
            return self.real(parents, letter)
        if kind == "q":
            return self.number(1.6, 3.0)
        if kind == "u":
            unit = [s for s in parents if s.family and FAMILIES[s.family].support == "unit"]
            return unit[0].name if unit else f"torch.sigmoid({self.real(parents, letter)})"
        if wide or self.chance(0.5):
            return self.number(0.6, 1.1)
        return self.positive([], letter) if self.chance(0.5) else self.number(0.5, 1.2)

    def arguments(self, family: str, parents: list[Site], letter: str) -> tuple[str, ...]:
        kinds = FAMILIES[family].arguments
        if kinds == "p":
            return (self.positive(parents, letter),)
        latent = letter == "b" or family in CONTINUOUS
        if family == "gamma" and letter == "a" and self.chance(0.5):
            return self.number(1.6, 3.0), self.positive(parents, letter)
        return tuple(self.argument(k, parents, letter, wide=latent) for k in kinds)

    # -- layout

    def draw(self, joint: bool) -> Pair:
        num_data = self.random.choice((3, 4, 5))
        inner = self.random.choice((0, 0, 0, 1, 1, 2))
        sizes = [2] if inner == 1 else [2, 3]
        names = ["rows_", "columns"][:inner]
        plates = dict(zip(names, sizes, strict=False))
        dims = list(range(-1 - inner, 0))
        self.random.shuffle(dims)
        places = dict(zip(["data", *names], dims, strict=True))
        sites = self._model(plates, joint)
        guide = self._guide(sites, joint)
        masked: tuple[str, ...] = ()
        if not joint and self.chance(0.3):
            sites, guide, masked = self._mask(sites, guide, plates)
        pair = Pair(
            seed=self.seed,
            sites=tuple(sites),
            guide=guide,
            plates=plates,
            dims=places,
            data={},
            parameters={},
            num_data=num_data,
            style=self._style(sites, plates),
            joint=tuple(s.name for s in sites if s.name.startswith("w")),
            masked=masked,
        )
        if not joint and not isinstance(guide, str) and self.chance(0.2):
            size = num_data - 1
            fixed = tuple(sorted(self.random.sample(range(num_data), size)))
            pair = replace(pair, rows=self.random.choice((fixed, size)))
        elif not joint and not isinstance(guide, str) and self.chance(0.1):
            pair = replace(pair, scale=2.5)
        elif pair.depth == 1 and not joint and self.chance(0.15):
            # Right for one particle, and blind to all others where particles share a tensor.
            pair.style["one_particle"] = "{0}.reshape(-1)[: len(c)]"
        data = _data(pair, torch.Generator().manual_seed(self.seed))
        generator = torch.Generator().manual_seed(self.seed + 1)
        values = {
            n: 0.6 * torch.randn(num_data, generator=generator, dtype=torch.float64)
            for n in self.parameters
        }
        if joint:  # what lies outside the plate has one value, not one for each datum
            values = {n: v[:1].expand(num_data).clone() for n, v in values.items()}
        return replace(pair, data=data, parameters=values)

    def _style(self, sites: list[Site], plates: dict[str, int]) -> dict:
        steps = []
        for plate in plates:  # those with nothing but observed sites can be loops
            inside = [s for s in sites if plate in s.plates]
            alone = len(inside) == 1 and len(inside[0].plates) == 1 and not inside[0].mask
            plain = alone and inside[0].kind == "observed"
            steps += [plate] if plain and self.chance(0.5) else []
        return {
            "form": self.random.choice(("param", "param", "module", "pyromodule")),
            "arguments": self.random.choice(("alone", "several", "keywords")),
            "dim": self.chance(0.5),
            "sequential": tuple(steps),
            "one_particle": "",
        }

    # -- sites

    def _model(self, plates: dict[str, int], joint: bool) -> list[Site]:
        kind = self.random.choice(("discrete", "continuous", "continuous", "mixed"))
        sites: list[Site] = []
        if joint:
            family = self.random.choice(("normal", "gamma", "bernoulli", "lognormal"))
            arguments = tuple(
                self.number(1.6, 3.0) if k in "qp" else self.number(-0.5, 0.5)
                for k in FAMILIES[family].arguments
            )
            sites.append(Site("w0", "latent", family, arguments))
            kind = self.random.choice(("discrete", "none"))
            kind = "none" if FAMILIES[family].support != "bit" and self.chance(0.6) else kind
        room, states = {"discrete": (0, 16), "continuous": (2, 1), "mixed": (1, 4), "none": (0, 1)}[
            kind
        ]
        if joint:
            states = min(states, 3)
        for _ in range(self.random.choice((1, 2, 3))):
            site, room, states = self._latent(sites, plates, room, states, joint)
            sites += [site] if site is not None else []
            if self.chance(0.2):
                within = self._within(plates, 0.3)
                parents = _visible(sites, within)
                if parents:
                    text = self.real(parents, "a")
                    sites.append(Site(f"d{len(sites)}", "deterministic", "", (text,), within))
        sites = _enumerate_some(self, sites)
        for number in range(self.random.choice((1, 1, 2, 3))):
            within = self._within(plates, 0.7) if number else tuple(plates)
            family = self.random.choice(OBSERVED)
            arguments = self.arguments(family, _visible(sites, within), "a")
            sites.append(Site(f"x{number}", "observed", family, arguments, within))
        if self.chance(0.15) and not joint:
            parents = [s for s in _visible(sites, ()) if s.kind != "observed"]
            bounded = " + ".join(f"0.5 * torch.sin({self.feature(s)})" for s in parents[:1])
            sites.append(Site("f0", "factor", "", (bounded or "0.3 * c",)))
        return sites

    def _within(self, plates: dict[str, int], probability: float) -> tuple[str, ...]:
        return tuple(p for p in plates if self.chance(probability))

    def _latent(
        self, sites: list[Site], plates: dict[str, int], room: int, states: int, joint: bool
    ) -> tuple[Site | None, int, int]:
        within = () if joint else self._within(plates, 0.35)
        cells = 1
        for plate in within:
            cells *= plates[plate]
        smooth = [n for n in CONTINUOUS if max(FAMILIES[n].event, 1) * cells <= room]
        finite = [n for n, k in DISCRETE.items() if k**cells <= states]
        if not smooth and not finite:
            return None, room, states
        family = self.random.choice(smooth or finite)
        if smooth:
            room -= max(FAMILIES[family].event, 1) * cells
        else:
            states //= DISCRETE[family] ** cells
        arguments = self.arguments(family, _visible(sites, within), "a")
        return Site(f"z{len(sites)}", "latent", family, arguments, within), room, states

    def _guide(self, sites: list[Site], joint: bool) -> tuple[Site, ...] | str:
        latents = [s for s in sites if s.kind == "latent" and not s.enumerated]
        smooth = bool(latents) and all(s.family in CONTINUOUS for s in latents)
        if smooth and self.chance(0.3):
            return self.random.choice(JOINT_AUTOGUIDES if joint else AUTOGUIDES)
        if self.chance(0.3):
            latents = latents[::-1]
        guide: list[Site] = []
        for site in latents:
            family = self.random.choice(SAME_SUPPORT[FAMILIES[site.family].support])
            parents = _visible(guide, site.plates)
            if site.name.startswith("w"):
                arguments = tuple(
                    self.number(1.6, 3.0) if k in "qp" else self.number(-0.5, 0.5)
                    for k in FAMILIES[family].arguments
                )
            elif family == "gamma":
                arguments = (self.number(1.6, 3.0), self.positive(parents, "b"))
            else:
                some = parents if self.chance(0.5) else []
                arguments = self.arguments(family, some, "b")
            guide.append(Site(site.name, "latent", family, arguments, site.plates))
        return tuple(guide)

    def _mask(
        self, sites: list[Site], guide: tuple[Site, ...] | str, plates: dict[str, int]
    ) -> tuple[list[Site], tuple[Site, ...] | str, tuple[str, ...]]:
        """Masks the observed sites of one layout, ragged where it has inner plates."""
        first = next(s for s in sites if s.kind == "observed")
        how = self.random.choice(("handler", "distribution"))
        shown = [
            replace(s, mask=how) if s.kind == "observed" and s.plates == first.plates else s
            for s in sites
        ]
        return shown, guide, first.plates


def _visible(sites: list[Site], within: tuple[str, ...]) -> list[Site]:
    return [s for s in sites if s.kind != "observed" and set(s.plates) <= set(within)]


def _enumerate_some(drawing: _Drawing, sites: list[Site]) -> list[Site]:
    return [
        replace(s, enumerated=True)
        if s.kind == "latent"
        and s.family in LISTED
        and not s.plates
        and s.name[0] != "w"
        and drawing.chance(0.3)
        else s
        for s in sites
    ]


def _data(pair: Pair, generator: torch.Generator) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    data: dict[str, Tensor] = {}
    for site in pair.sites:
        if site.kind == "observed":
            shape = (pair.num_data, *(pair.plates[p] for p in site.plates))
            shape += (site.event,) if site.event else ()
            data[site.name] = _IN_SUPPORT[FAMILIES[site.family].support](normal(*shape))
    data["c"] = 0.5 * normal(pair.num_data)
    if any(s.mask for s in pair.sites):
        shape = (pair.num_data, *(pair.plates[p] for p in pair.masked))
        data["m"] = normal(*shape) > -0.4
    return data


_IN_SUPPORT: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda u: u,
    "reals": lambda u: u,
    "positive": lambda u: (0.5 * u).exp(),
    "unit": torch.sigmoid,
    "bit": lambda u: (u > 0).to(u),
    "three": lambda u: (u > -0.4).long() + (u > 0.4).long(),
    "upto2": lambda u: ((u > -0.4).long() + (u > 0.4).long()).to(u),
    "upto3": lambda u: ((u > -0.7).long() + (u > 0).long() + (u > 0.7).long()).to(u),
    "count": lambda u: (1.5 * u.abs()).floor(),
}


def draw_pair(seed: int) -> Pair:
    """A right pair; every seventh has a global latent and wants joint weights."""
    return _Drawing(seed).draw(joint=seed % 7 == 3)


# --- wrong by design ------------------------------------------------------------------------------

# What was done to the pair, and words one of which the refusal must hold.
FAULTS: dict[str, tuple[str, ...]] = {
    "missing": ("site",),
    "extra": ("'extra'",),
    "global": ("'w'",),
    "global_model": ("'w'",),
    "data_mean": ("site",),
    "data_sorted": ("site",),
    "latent_mean": ("site",),
    "latent_roll": ("site",),
    "crossed": ("site",),
    "in_place": ("argument", "in place", "in-place"),
    "in_place_adds": ("deterministic", "in place", "in-place"),
    "random_model": ("deterministic",),
    "random_guide": ("deterministic",),
    "guide_observes": ("'seen'",),
    "guide_obs": ("observed",),
    "plate_size_model": ("plate", "site"),
    "plate_size_guide": ("plate", "site"),
    "no_plate": ("plate",),
    "scale": ("scale",),
    "delta": ("Delta",),
    "to_event": ("to_event",),
    "enumerated_vector": ("enumeration",),
    "off_support": ("support",),
}


def draw_wrong(seed: int, fault: str) -> Pair:
    """A pair with one fault: what is right of a random pair, rid of what would hide the fault."""
    for attempt in range(200):
        pair = draw_pair(7 * (1000 * seed + attempt))  # no joint ones
        spoilt = _spoil(pair, fault)
        if spoilt is not None:
            return replace(spoilt, fault=fault)
    raise AssertionError(f"no pair can have the fault {fault}")


def _spoil(pair: Pair, fault: str) -> Pair | None:
    masked = any(s.mask for s in pair.sites)
    if isinstance(pair.guide, str) or pair.rows is not None or not pair.guide or masked:
        return None
    first = next(s for s in pair.sites if s.kind == "observed")
    last = pair.guide[-1]
    if fault == "missing" and any(last.name in a for s in pair.guide for a in s.arguments):
        return None
    if fault in ("global", "global_model") and pair.scale != 1.0:
        return None
    if fault in ("data_mean", "data_sorted", "random_model"):
        # Data without ties: where all rows are alike, none moves another.
        if FAMILIES[first.family].arguments[0] != "r" or first.family in (*DISCRETE, "negative"):
            return None
        return _shifted(pair, first, "s")
    if fault in ("latent_mean", "latent_roll", "crossed"):
        return _mix(pair, first, fault)
    if fault in ("in_place", "in_place_adds"):
        return pair if any(" c" in a for s in pair.sites for a in s.arguments) else None
    if fault in ("guide_obs", "delta"):
        plain = len(pair.guide) == 1 and last.family in ("normal", "affine") and not last.plates
        return pair if plain else None
    if fault == "enumerated_vector":
        return _with_hidden_bits(pair)
    if fault == "to_event":
        return pair if first.family == "normals" else None
    if fault == "off_support":
        wrong = {"bit": 0.5, "count": 1.5, "positive": -1.0, "upto2": 4.0, "unit": 1.5}
        value = wrong.get(FAMILIES[first.family].support)
        if value is None:
            return None
        spoilt = pair.data[first.name].clone()
        spoilt.view(-1)[0] = value
        return replace(pair, data={**pair.data, first.name: spoilt})
    return pair


def _with_hidden_bits(pair: Pair) -> Pair:
    bits = Site("k", "latent", "bits", ("0.2", "-0.3"), enumerated=True)
    return replace(pair, sites=(bits, *pair.sites))


def _shifted(pair: Pair, site: Site, text: str) -> Pair:
    changed = replace(site, arguments=(f"{site.arguments[0]} + {text}", *site.arguments[1:]))
    return replace(pair, sites=tuple(changed if s is site else s for s in pair.sites))


def _mix(pair: Pair, first: Site, fault: str) -> Pair | None:
    """The first observed site reads latents of other data."""
    at = pair.dims["data"]
    numbers = [
        s.name
        for s in pair.drawn
        if FAMILIES[s.family].support in ("real", "positive", "unit") and not s.plates
    ]
    if not numbers or FAMILIES[first.family].arguments[0] != "r":
        return None
    if fault == "crossed" and (
        pair.plates or first.event or FAMILIES[first.family].arguments != "rp"
    ):
        return None
    text = {
        "latent_mean": f"{numbers[0]}.mean({at}, keepdim=True)",
        "latent_roll": f"{numbers[0]}.roll(1, {at})",
        "crossed": f"{numbers[0]}[..., None]",
    }[fault]
    return _shifted(pair, first, text)
