import QMP
import Testing

@testable import CommandLineKit

@Suite("Quantities are read as people write them")
struct QuantityTests {
    @Test(
        "sizes take K, M, G and T as powers of 1024, in either case",
        arguments: [
            ("0", 0), ("4096", 4096), ("4K", 4096), ("512M", 512 << 20), ("1g", 1 << 30), ("3T", 3 << 40),
            ("18446744073709551615", UInt64.max), ("16777215T", 16_777_215 << 40),
        ] as [(String, UInt64)])
    func sizes(text: String, bytes: UInt64) throws {
        #expect(try ByteSize(text).bytes == bytes)
    }

    @Test(
        "what is no size is refused, and quoted",
        arguments: [
            "", "M", "-1M", "+5", "1.5G", "1 G", "0x10", "3Q", "1GiB", "١M", "18446744073709551616", "16777216T",
        ])
    func badSizes(text: String) {
        let error = #expect(throws: QuantityError.self) { try ByteSize(text) }
        #expect(error?.description.contains("'\(text)'") == true)
    }

    @Test(
        "times need a unit",
        arguments: [
            ("0", 0), ("300ms", 300_000_000), ("2s", 2_000_000_000), ("500us", 500_000), ("7ns", 7),
        ] as [(String, UInt64)])
    func times(text: String, nanoseconds: UInt64) throws {
        #expect(try TimeSpan(text).nanoseconds == nanoseconds)
    }

    @Test("what is no time is refused", arguments: ["", "300", "s", "-1s", "1.5s", "1h", "99999999999999s", "5 ms"])
    func badTimes(text: String) {
        let error = #expect(throws: QuantityError.self) { try TimeSpan(text) }
        #expect(error?.description.contains("'\(text)'") == true)
    }

    @Test(
        "memory is shown with three digits at most",
        arguments: [
            (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (512 << 20, "512 MiB"),
            ((1 << 30) - 1, "1 GiB"), (3 << 40, "3 TiB"),
        ] as [(UInt64, String)])
    func memory(bytes: UInt64, text: String) {
        #expect(Amount.memory(bytes) == text)
    }

    @Test(
        "rates are shown in powers of 1000",
        arguments: [(0, "0 B/s"), (999, "999 B/s"), (1_840_000_000, "1.84 GB/s"), (412_300_000, "412 MB/s")])
    func rates(rate: Double, text: String) {
        #expect(Amount.rate(rate) == text)
    }

    @Test(
        "times are shown in the unit that fits",
        arguments: [
            (0, "0 ms"), (850, "850 ns"), (1500, "1.5 us"), (3_410_000, "3.41 ms"), (999_700_000, "1 s"),
            (2_500_000_000, "2.5 s"), (200_000_000_000, "3 min 20 s"), (7_260_000_000_000, "2 h 1 min"),
        ] as [(UInt64, String)])
    func shownTimes(nanoseconds: UInt64, text: String) {
        #expect(Amount.time(nanoseconds: nanoseconds) == text)
    }

    @Test("a decimal is rounded, and nonsense is a question mark")
    func decimals() {
        #expect(Amount.decimal(1.005, digits: 1) == "1.0")
        #expect(Amount.decimal(0.9996, digits: 3) == "1.000")
        #expect(Amount.decimal(-2.25, digits: 2) == "-2.25")
        #expect(Amount.decimal(12, digits: 0) == "12")
        #expect(Amount.decimal(.infinity, digits: 2) == "?")
        #expect(Amount.decimal(.nan, digits: 2) == "?")
    }

    @Test("when a guest moves before its memory: after so many rounds, or once the migration is stalled")
    func postcopy() throws {
        #expect(try PostcopyStart("after=3") == .afterRounds(3))
        #expect(try PostcopyStart("stalled") == .whenStalled)
        for text in ["", "after", "after=", "after=-1", "after=x", "now"] {
            #expect(throws: QuantityError.self) { try PostcopyStart(text) }
        }
        func reading(_ status: String, _ round: Int, _ verdict: String = "converging") -> MigrationReading {
            MigrationReading([
                "status": .string(status), "ram": ["dirty-sync-count": JSON(round)],
                "x-verdict": ["state": .string(verdict), "sentence": "s"],
            ])
        }
        #expect(PostcopyStart.afterRounds(0).isDue(reading("setup", 0)))
        #expect(!PostcopyStart.afterRounds(2).isDue(reading("active", 2)))
        #expect(PostcopyStart.afterRounds(2).isDue(reading("active", 3)))
        #expect(!PostcopyStart.afterRounds(0).isDue(reading("device", 9)))
        #expect(!PostcopyStart.whenStalled.isDue(reading("active", 9)))
        #expect(PostcopyStart.whenStalled.isDue(reading("active", 9, "not-converging")))
    }
}
