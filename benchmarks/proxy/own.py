"""What `keepalive run` alone does: hold callers for a cold model, release them, keep its pace under overload."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure, beside what is wanted."""

    title: str
    value: float
    unit: str
    most: float | None = None

    @property
    def missed(self) -> bool:
        return self.most is not None and self.value > self.most

    def __str__(self) -> str:
        shown = f"{self.value:.0f}" if self.value >= 100 else f"{self.value:.3g}"
        wanted = "" if self.most is None else f"<= {self.most:g}" + ("   missed" if self.missed else "")
        return f"  {self.title:<66}{shown:>8} {self.unit:<12}{wanted}".rstrip()


def measured(*, short: bool) -> list[Row]:
    return []
