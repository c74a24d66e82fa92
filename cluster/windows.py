"""Windows of time for schedules: `day@03:00` in cron's words, and the name of the window that has begun last.

A run that starts late, or again, computes the same name from the clock as one that starts on time: so the name can be the key
that makes a window happen once. All times are UTC.
"""

from datetime import UTC, datetime, timedelta

from pipelines.cluster_config import RULE
from pipelines.errors import UsageError

PERIODS = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(weeks=1)}
MONDAY = datetime(2024, 1, 1, tzinfo=UTC)


def cron(every: str, at: str) -> str:
    """The five fields of a CronJob: `cron("day", "03:30")` is `30 3 * * *`."""
    hour, minute = (int(part) for part in at.split(":"))
    return {"hour": f"{minute} * * * *", "day": f"{minute} {hour} * * *", "week": f"{minute} {hour} * * 1"}[every]


def name_of(window: str, now: datetime | None = None) -> str:
    """The name of the window that a rule like `day@03:00` is in at `now`; any other word is a name already.

    `2026-11-22` for days, `2026-11-22t03` for hours, `2026-w47` for weeks, by the time at which the window began.
    """
    rule = RULE.fullmatch(window)
    if rule is None:
        return window
    began = start_of(rule[1], f"{rule[2]}:{rule[3]}", now or datetime.now(UTC))
    if rule[1] == "week":
        year, week, _ = began.isocalendar()
        return f"{year}-w{week:02}"
    return began.strftime("%Y-%m-%d" if rule[1] == "day" else "%Y-%m-%dt%H")


def start_of(every: str, at: str, now: datetime) -> datetime:
    """The last tick of the schedule at or before `now`. Raises UsageError for a time without a zone."""
    if now.tzinfo is None:
        raise UsageError("windows are told in UTC: give a time with a zone")
    hour, minute = (int(part) for part in at.split(":"))
    first = MONDAY + timedelta(hours=0 if every == "hour" else hour, minutes=minute)
    period = PERIODS[every]
    return first + (now.astimezone(UTC) - first) // period * period
