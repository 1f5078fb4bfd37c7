"""What is asked and said for every instance: statements made once, past SQLAlchemy."""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Insert, Select, Update
from sqlalchemy.dialects import sqlite

from dicomnode.errors import JournalBusy

_DIALECT = sqlite.dialect(paramstyle="qmark")


@dataclass(frozen=True, slots=True)
class Quick:
    """A statement that is said for every instance, past SQLAlchemy, which takes longer than SQLite.

    Values are taken as SQLite has them.
    """

    text: str
    names: tuple[str, ...]
    fixed: Mapping[str, Any]

    @classmethod
    def of(cls, statement: Select[Any] | Insert | Update, columns: Sequence[str] = ()) -> "Quick":
        """`columns`: which of them an insert gives; default: those the statement names."""
        compiled = statement.compile(dialect=_DIALECT, column_keys=list(columns) or None)
        fixed = {name: value for name, value in compiled.params.items() if value is not None}
        return cls(str(compiled), tuple(compiled.positiontup or ()), fixed)

    def say(self, db: Connection, values: Mapping[str, Any]) -> sqlite3.Cursor:
        """Run it in the transaction of `db`.

        Raises:
            JournalBusy: SQLite refuses.
        """
        return self.over(db.connection.driver_connection, values)

    def over(self, connection: Any, values: Mapping[str, Any]) -> sqlite3.Cursor:
        """Run it over a connection of the driver.

        Raises:
            JournalBusy: SQLite refuses.
        """
        given = {**self.fixed, **values}
        try:
            said: sqlite3.Cursor = connection.execute(self.text, [given[n] for n in self.names])
        except sqlite3.Error as error:
            raise JournalBusy(f"the journal cannot be used now: {error}") from error
        return said
