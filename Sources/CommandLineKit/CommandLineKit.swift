//! The CommandLineKit room: what the command line reads and shows, apart from doing it.
//!
//! `ByteSize` and `TimeSpan` are how people write quantities, `Amount` how they are shown. `MigrationReading` is one look at
//! `query-migrate`; `LiveLine` makes the moving line of it and `MigrationReport` the last word, `TextTable` the tables. `Terminal`
//! and `SignalWatch` are the two places where the process meets its terminal.
