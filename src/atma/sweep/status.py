"""How a sweep stands, for people: counts, who is at work on what, what failed, and when it may end."""

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from atma.sweep.ledger import Ledger, Standing, counts
from atma.train.progress import clock

if TYPE_CHECKING:
    from rich.table import Table

RECENT = 20


@dataclass
class Follower:
    """Reads a ledger again and again, each result once."""

    ledger: Ledger
    seconds: dict[str, float] = field(default_factory=dict)
    standings: list[Standing] = field(default_factory=list)

    def look(self) -> list[dict[str, Any]]:
        """Read how everything stands; returns the results that are new."""
        self.standings = self.ledger.standings()
        fresh = []
        for standing in self.standings:
            if standing.state == "done" and standing.cell not in self.seconds:
                result = self.ledger.task(standing.cell).result()
                if result is not None:
                    self.seconds[standing.cell] = result["seconds"]
                    fresh.append(result)
        return fresh

    def line(self) -> str:
        """Counts and the time left in one line."""
        found = counts(self.standings)
        parts = [f"{found['done']}/{len(self.standings)} done"]
        parts += [f"{found[state]} {state}" for state in ("running", "stale", "failed", "waiting") if found[state]]
        left = self.seconds_left()
        return ", ".join(parts) + (f", about {clock(left)} left" if left else "")

    def seconds_left(self) -> float | None:
        """From the mean of the last cells and the workers there are now; None where neither is known."""
        running = [standing for standing in self.standings if standing.state == "running"]
        found = counts(self.standings)
        todo = found["waiting"] + found["stale"] + found["running"] - sum(map(share_done, running))
        if not self.seconds or not running:
            return None
        return statistics.mean(list(self.seconds.values())[-RECENT:]) * todo / len(running)


def share_done(standing: Standing) -> float:
    """How much of a cell is done: training counts as three quarters."""
    doing = standing.doing
    if not doing.get("of"):
        return 0.0
    share = doing["done"] / doing["of"]
    return 0.75 * share if doing.get("stage") == "training" else 0.75 + 0.25 * share


def result_line(result: dict[str, Any], label: str) -> str:
    """One finished cell in a line."""
    metrics = result["metrics"]
    parts = [f"{label}: {clock(result['seconds'])}"]
    if "final_val_loss_nats" in metrics:
        parts.append(f"validation {metrics['final_val_loss_nats']:.3f}")
    needles = [key for key in metrics if key.startswith("needle_token_acc_")]
    if needles:
        lengths = sorted(int(key.rpartition("_")[2]) for key in needles)
        parts += [f"needles at {at:,}: {metrics[f'needle_token_acc_{at}']:.0f}%" for at in (lengths[0], lengths[-1])]
    return ", ".join(parts)


def table(follower: Follower) -> "Table":
    """Every cell that is neither done nor waiting."""
    from rich.table import Table

    shown = Table(title=follower.line())
    for name in ("cell", "", "state", "attempt", "doing", "worker"):
        shown.add_column(name, no_wrap=name in ("cell", "state"), overflow="fold")
    for standing in follower.standings:
        if standing.state in ("running", "stale", "failed"):
            who = f"{standing.worker['host']}:{standing.worker['pid']}" if standing.worker else ""
            attempt = str(standing.attempts or "")
            shown.add_row(standing.cell, standing.label, standing.state, attempt, _doing(standing), who)
    return shown


def _doing(standing: Standing) -> str:
    doing = standing.doing
    return f"{doing['stage']} {doing['done']:,}/{doing['of']:,}" if doing.get("of") else ""
