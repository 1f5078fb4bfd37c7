"""A journal of an older version: brought up to date whole, or left as it was."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dicomnode import migrations
from dicomnode.cli import main
from dicomnode.errors import JournalError
from dicomnode.history import History
from dicomnode.jobs import Jobs
from dicomnode.journal import Arrival, Journal
from dicomnode.lifecycle import Delivery, State
from dicomnode.migrations import SCHEMA_VERSION, STEPS, migrate, version_of
from dicomnode.tables import Database

VERSION_1 = """
CREATE TABLE meta ("key" VARCHAR NOT NULL, value VARCHAR, PRIMARY KEY ("key"));
CREATE TABLE associations (id INTEGER NOT NULL, calling_ae VARCHAR NOT NULL,
    called_ae VARCHAR NOT NULL, host VARCHAR NOT NULL, started FLOAT NOT NULL, ended FLOAT,
    how VARCHAR, PRIMARY KEY (id));
CREATE TABLE instances (sop_instance_uid VARCHAR NOT NULL, series_uid VARCHAR NOT NULL,
    sop_class_uid VARCHAR NOT NULL, transfer_syntax_uid VARCHAR NOT NULL,
    sha256 VARCHAR NOT NULL, size INTEGER NOT NULL, received FLOAT NOT NULL, association INTEGER,
    plane VARCHAR, expected VARCHAR, purged BOOLEAN NOT NULL, PRIMARY KEY (sop_instance_uid));
CREATE INDEX ix_instances_series_uid ON instances (series_uid);
CREATE INDEX ix_instances_association ON instances (association);
CREATE TABLE conflicts (id INTEGER NOT NULL, sop_instance_uid VARCHAR NOT NULL,
    series_uid VARCHAR NOT NULL, sha256 VARCHAR NOT NULL, received FLOAT NOT NULL,
    PRIMARY KEY (id));
CREATE TABLE series (series_uid VARCHAR NOT NULL, study_uid VARCHAR NOT NULL,
    modality VARCHAR NOT NULL, calling_ae VARCHAR NOT NULL, called_ae VARCHAR NOT NULL,
    first_received FLOAT NOT NULL, last_received FLOAT NOT NULL, open BOOLEAN NOT NULL,
    generation INTEGER NOT NULL, interrupted BOOLEAN NOT NULL, outcome VARCHAR NOT NULL,
    PRIMARY KEY (series_uid));
CREATE INDEX ix_series_open ON series (open);
CREATE TABLE events (id INTEGER NOT NULL, at FLOAT NOT NULL, series_uid VARCHAR NOT NULL,
    job INTEGER, text VARCHAR NOT NULL, PRIMARY KEY (id));
CREATE INDEX events_by_series ON events (series_uid, id);
CREATE TABLE commitments (transaction_uid VARCHAR NOT NULL, peer VARCHAR NOT NULL,
    state VARCHAR NOT NULL, asked FLOAT NOT NULL, due FLOAT NOT NULL, attempts INTEGER NOT NULL,
    updated FLOAT NOT NULL, detail VARCHAR NOT NULL, PRIMARY KEY (transaction_uid));
CREATE INDEX ix_commitments_state ON commitments (state);
CREATE TABLE performed_steps (sop_instance_uid VARCHAR NOT NULL, calling_ae VARCHAR NOT NULL,
    status VARCHAR NOT NULL, created FLOAT NOT NULL, updated FLOAT NOT NULL,
    PRIMARY KEY (sop_instance_uid));
CREATE TABLE jobs (id INTEGER NOT NULL, series_uid VARCHAR NOT NULL, generation INTEGER NOT NULL,
    route VARCHAR NOT NULL, state VARCHAR NOT NULL, code VARCHAR NOT NULL,
    detail VARCHAR NOT NULL, priority INTEGER NOT NULL, attempts INTEGER NOT NULL,
    created FLOAT NOT NULL, updated FLOAT NOT NULL, derived_uid VARCHAR, findings VARCHAR,
    PRIMARY KEY (id), FOREIGN KEY(series_uid) REFERENCES series (series_uid));
CREATE INDEX ix_jobs_series_uid ON jobs (series_uid);
CREATE INDEX ix_jobs_state ON jobs (state);
CREATE TABLE commitment_items (transaction_uid VARCHAR NOT NULL, position INTEGER NOT NULL,
    sop_class_uid VARCHAR NOT NULL, sop_instance_uid VARCHAR NOT NULL, failure INTEGER,
    PRIMARY KEY (transaction_uid, position),
    FOREIGN KEY(transaction_uid) REFERENCES commitments (transaction_uid));
CREATE INDEX ix_commitment_items_sop_instance_uid ON commitment_items (sop_instance_uid);
CREATE TABLE performed_series (step VARCHAR NOT NULL, series_uid VARCHAR NOT NULL,
    instances VARCHAR NOT NULL, PRIMARY KEY (step, series_uid),
    FOREIGN KEY(step) REFERENCES performed_steps (sop_instance_uid));
CREATE INDEX ix_performed_series_series_uid ON performed_series (series_uid);
CREATE TABLE outputs (job INTEGER NOT NULL, sop_instance_uid VARCHAR NOT NULL,
    sop_class_uid VARCHAR NOT NULL, PRIMARY KEY (job, sop_instance_uid),
    FOREIGN KEY(job) REFERENCES jobs (id));
CREATE TABLE deliveries (id INTEGER NOT NULL, job INTEGER NOT NULL, destination VARCHAR NOT NULL,
    state VARCHAR NOT NULL, attempts INTEGER NOT NULL, created FLOAT NOT NULL,
    due FLOAT NOT NULL, detail VARCHAR NOT NULL, PRIMARY KEY (id),
    FOREIGN KEY(job) REFERENCES jobs (id));
CREATE INDEX ix_deliveries_job ON deliveries (job);
CREATE INDEX ix_deliveries_state ON deliveries (state);
CREATE TABLE acceptances (delivery INTEGER NOT NULL, sop_instance_uid VARCHAR NOT NULL,
    status INTEGER NOT NULL, at FLOAT NOT NULL, PRIMARY KEY (delivery, sop_instance_uid),
    FOREIGN KEY(delivery) REFERENCES deliveries (id));
INSERT INTO meta VALUES ('schema', '1');
"""
"""The journal of version 1, as its node made it."""

ROWS = """
INSERT INTO associations VALUES (1, 'CT1', 'DICOMNODE', '127.0.0.1', 9.0, 11.0, 'released'),
    (2, 'CT1', 'DICOMNODE', '127.0.0.1', 12.0, NULL, NULL);
INSERT INTO series VALUES
    ('1.1', '1', 'CT', 'CT1', 'DICOMNODE', 10.0, 11.0, 0, 1, 0, 'routed: r'),
    ('1.2', '1', 'CT', 'CT1', 'DICOMNODE', 12.0, 12.0, 1, 1, 0, '');
INSERT INTO instances VALUES
    ('1.1.1', '1.1', '1.2.840', '1.2', 'a', 10, 10.0, 1, '{"position": [0, 0, 1]}', NULL, 0),
    ('1.1.2', '1.1', '1.2.840', '1.2', 'b', 11, 11.0, 1, NULL, '{"InstanceNumber": 2}', 1),
    ('1.2.1', '1.2', '1.2.840', '1.2', 'c', 12, 12.0, 2, NULL, NULL, 0);
INSERT INTO conflicts VALUES (1, '1.1.1', '1.1', 'd', 10.5);
INSERT INTO jobs VALUES
    (1, '1.1', 1, 'r', 'sending', '', '', 1, 2, 20.0, 21.0, '2.1', '{"mean": 1.5}'),
    (2, '1.1', 1, 'q', 'queued', '', '', 1, 0, 20.0, 20.0, NULL, NULL),
    (3, '1.1', 1, 'p', 'failed', 'WORKER_LOST', 'why', 2, 4, 20.0, 22.0, NULL, NULL);
INSERT INTO outputs VALUES (1, '2.1.1', '1.2.840'), (1, '2.1.2', '1.2.840');
INSERT INTO deliveries VALUES (1, 1, 'pacs', 'waiting', 3, 21.0, 25.0, 'refused'),
    (2, 1, 'other', 'delivered', 0, 21.0, 21.0, '');
INSERT INTO acceptances VALUES (1, '2.1.1', 0, 23.0), (2, '2.1.1', 0, 22.0),
    (2, '2.1.2', 273, 22.0);
INSERT INTO events VALUES (1, 10.0, '1.1', NULL, 'first instance from CT1'),
    (2, 20.0, '1.1', 1, 'job 1 sending');
INSERT INTO commitments VALUES ('9.1', 'pacs', 'reporting', 30.0, 40.0, 1, 31.0, 'no answer');
INSERT INTO commitment_items VALUES ('9.1', 0, '1.2.840', '1.1.1', 0),
    ('9.1', 1, '1.2.840', '1.1.9', 274);
INSERT INTO performed_steps VALUES ('8.1', 'CT1', 'COMPLETED', 9.0, 12.0);
INSERT INTO performed_series VALUES ('8.1', '1.1', '["1.1.1"]');
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A journal of version 1 with rows in every table."""
    path = tmp_path / "data" / "journal.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(VERSION_1 + ROWS)
    return path


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables, but for the version."""
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        names = [
            row["name"] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        tables = {
            name: [dict(row) for row in db.execute(f"SELECT * FROM {name} ORDER BY rowid")]  # noqa: S608
            for name in names
        }
    del tables["meta"]
    return tables


def schema(path: Path) -> dict[str, Any]:
    """Columns, foreign keys and indexes of every table; the order of the columns means nothing."""
    found: dict[str, Any] = {}
    with closing(sqlite3.connect(path)) as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
            columns = db.execute(f"PRAGMA table_info({name})").fetchall()
            keys = db.execute(f"PRAGMA foreign_key_list({name})").fetchall()
            indexes = db.execute(f"PRAGMA index_list({name})").fetchall()
            found[name] = (
                {column[1]: column[2:] for column in columns},
                sorted(keys),
                {
                    row[1]: (row[2:], db.execute(f"PRAGMA index_xinfo({row[1]})").fetchall())
                    for row in indexes
                    if row[3] == "c"
                },
            )
    for _, _, indexes in found.values():  # by the names of their columns: positions may differ
        for name, (kind, columns) in indexes.items():
            indexes[name] = (kind, [column[2:] for column in columns if column[5]])
    return found


def test_every_version_has_its_step() -> None:
    assert sorted(STEPS) == list(range(1, SCHEMA_VERSION))


def test_a_journal_brought_up_to_date_is_like_a_new_one(old: Path, tmp_path: Path) -> None:
    Database(old).close()
    Database(tmp_path / "new.db").close()
    assert schema(old) == schema(tmp_path / "new.db")
    assert version_of(old) == version_of(tmp_path / "new.db") == SCHEMA_VERSION


def test_every_row_survives(old: Path) -> None:
    before = rows(old)
    assert all(before.values())  # no table without a row to lose
    Database(old).close()
    after = rows(old)
    assert set(before) <= set(after)
    for table, kept in before.items():
        assert [{k: row[k] for k in kept[0]} for row in after[table]] == kept, table


def test_outputs_get_the_derived_series_of_their_job(old: Path) -> None:
    Database(old).close()
    assert [row["series_uid"] for row in rows(old)["outputs"]] == ["2.1", "2.1"]
    assert [(row["crashes"], row["purged"]) for row in rows(old)["jobs"]] == [(0, 0)] * 3


def test_files_a_crash_left_of_earlier_purges_are_to_be_deleted(old: Path) -> None:
    Database(old).close()
    assert rows(old)["removals"] == [{"kind": "received", "series_uid": "1.1"}]


def test_the_node_goes_on_with_what_an_older_one_left(old: Path) -> None:
    """Receiving, closing, translating, delivering and looking."""
    database = Database(old)
    journal, jobs = Journal(database), Jobs(database)
    journal.recover(100.0)
    jobs.recover(100.0)
    facts = ("1.2", "1", "CT", "1.2", "1.2", "0" * 64, 1, "CT1", "DICOMNODE", None, None)
    assert journal.record_instance(Arrival("1.2.2", *facts), 101.0)
    (seen,) = journal.open_series()
    assert seen.interrupted  # its association was cut
    assert jobs.close_series(seen, "routed: r", [("r", "routine")], [], 102.0)
    job = jobs.claim(103.0)
    assert job is not None
    assert job.id == 2
    (due,) = jobs.due_deliveries(104.0)
    assert due.remaining == ("2.1.2",)
    jobs.accepted(due.id, {"2.1.2": 0}, 105.0)
    jobs.delivered(due, "", 105.0)
    assert jobs.deliveries_in_state(Delivery.DELIVERED) == [1, 2]
    assert History(database).counts()["jobs"] == {
        State.DONE: 1,
        State.FAILED: 1,
        State.QUEUED: 1,
        State.TRANSLATING: 1,
    }


def test_a_backup_of_the_old_journal_lies_beside_it(old: Path) -> None:
    before = rows(old)
    Database(old).close()
    backup = old.with_name("journal.db.v1.bak")
    assert version_of(backup) == 1
    assert rows(backup) == before
    others = {path.name for path in old.parent.iterdir()}
    assert others == {"journal.db", "journal.db.v1.bak"}


def test_the_backup_has_what_is_only_in_the_write_ahead_log(old: Path) -> None:
    """Another connection is open, so that nothing was written into the main file yet."""
    with closing(sqlite3.connect(old)) as busy:
        busy.execute("INSERT INTO conflicts VALUES (2, '1.1.2', '1.1', 'e', 10.5)")
        busy.commit()
        Database(old).close()
        assert len(rows(old.with_name("journal.db.v1.bak"))["conflicts"]) == 2
    assert len(rows(old)["conflicts"]) == 2


def test_an_up_to_date_journal_is_left_alone(old: Path) -> None:
    Database(old).close()
    backup = old.with_name("journal.db.v1.bak")
    backup.unlink()
    Database(old).close()
    assert not backup.exists()


@pytest.mark.parametrize("statement", range(len(STEPS[1]) + 1))
def test_a_step_that_fails_leaves_the_old_version(
    old: Path, monkeypatch: pytest.MonkeyPatch, statement: int
) -> None:
    before, shape = rows(old), schema(old)
    broken = (*STEPS[1][:statement], "INSERT INTO no_such_table VALUES (1)")
    with monkeypatch.context() as patch:
        patch.setitem(STEPS, 1, broken)
        with pytest.raises(JournalError, match="nothing is changed: no such table"):
            Database(old)
    assert (rows(old), schema(old), version_of(old)) == (before, shape, 1)
    Database(old).close()  # and the next start goes through
    assert version_of(old) == SCHEMA_VERSION


def test_a_step_that_loses_a_row_others_need_is_undone(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEPS, 1, ("DELETE FROM series WHERE series_uid = '1.1'",))
    with pytest.raises(JournalError, match="refer to rows that are not there"):
        migrate(old)
    assert len(rows(old)["series"]) == 2


_KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from dicomnode import migrations
real = sqlite3.connect
class Dying(sqlite3.Connection):
    def execute(self, statement, *arguments):
        if statement == {last!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(statement, *arguments)
migrations.sqlite3.connect = lambda *a, **k: real(*a, factory=Dying, **k)
migrations.migrate(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("last", [STEPS[1][0], STEPS[1][-1], "COMMIT"])
def test_a_kill_in_the_middle_leaves_the_old_version(old: Path, last: str) -> None:
    before, shape = rows(old), schema(old)
    program = _KILLED.format(last=last)
    killed = subprocess.run([sys.executable, "-c", program, str(old)], check=False)
    assert killed.returncode == -9
    assert (rows(old), schema(old), version_of(old)) == (before, shape, 1)
    Database(old).close()
    assert version_of(old) == SCHEMA_VERSION
    assert len(rows(old)["outputs"]) == 2


def test_several_steps_are_a_transaction_each(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    monkeypatch.setitem(STEPS, SCHEMA_VERSION, ("DELETE FROM events", "this is no SQL"))
    with pytest.raises(JournalError, match="syntax error"):
        migrate(old)
    assert version_of(old) == SCHEMA_VERSION
    assert len(rows(old)["events"]) == 2
    assert version_of(old.with_name("journal.db.v1.bak")) == 1


@pytest.mark.parametrize("command", [("status",), ("retry", "--all-failed")])
def test_a_command_does_not_change_an_old_journal_and_says_what_will(
    old: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(old)
    config = old.parents[1] / "config.yaml"
    config.write_text(f"node: {{data_dir: {old.parent}}}\nroutes: []\n")
    assert main([command[0], "--config", str(config), *command[1:]]) == 1
    said = capsys.readouterr().err
    assert f"schema 1, this version reads {SCHEMA_VERSION}" in said
    assert "`dicomnode serve` of this version brings it up to date" in said
    assert rows(old) == before


def _newer(db: sqlite3.Connection) -> None:
    db.execute("UPDATE meta SET value = '999' WHERE key = 'schema'")


def _odd(db: sqlite3.Connection) -> None:
    db.execute("UPDATE meta SET value = 'two' WHERE key = 'schema'")


@pytest.mark.parametrize(
    ("change", "words"),
    [(_newer, "schema 999, this version reads .*run the newer"), (_odd, "does not say which")],
)
@pytest.mark.parametrize("create", [True, False])
def test_a_newer_or_odd_journal_is_refused_and_kept(
    old: Path, change: Callable[[sqlite3.Connection], None], words: str, create: bool
) -> None:
    with closing(sqlite3.connect(old)) as db, db:
        change(db)
    before = rows(old)
    with pytest.raises(JournalError, match=words):
        Database(old, create=create)
    assert rows(old) == before
    assert not old.with_name("journal.db.v1.bak").exists()


def test_a_first_version_that_was_stopped_before_it_said_so_is_one(old: Path) -> None:
    """Version 1 wrote its number after its tables, in a transaction of its own."""
    with closing(sqlite3.connect(old)) as db, db:
        db.execute("DELETE FROM meta")
    assert version_of(old) == 1
    Database(old).close()
    assert version_of(old) == SCHEMA_VERSION
