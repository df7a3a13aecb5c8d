import CommandLineKit

/// One guest of `godwit bench big-guests`, and who runs it.
struct BigGuestCell: Hashable, Sendable {
    var vmm: MeasuredVMM
    var gibibytes: UInt64
    var cpuCount: Int
    /// Bytes of memory that are not zero, before rounding to pages.
    var filledBytes: UInt64

    /// The guest sleeps, as that of the thread did, but for a heartbeat: its first vCPU wakes every millisecond, the others halt.
    var guest: String { "idle,fill=\(filledBytes / 4096 * 4096),heartbeat=1ms" }

    var parameters: [(name: String, value: String)] {
        [
            ("vmm", vmm.rawValue), ("memory", "\(gibibytes) GiB"), ("vcpus", "\(cpuCount)"),
            ("non-zero", Self.words(filledBytes)),
        ]
    }

    var name: String { BenchmarkCell(parameters).name }

    static func words(_ bytes: UInt64) -> String { "\(Amount.decimal(Double(bytes) / 1e9, digits: 1)) GB" }

    /// What both processes take from the host: the pages themselves, and what KVM and page tables keep for each page of the guest, be it
    /// touched or not (10 bytes without a second level of paging in hardware; QEMU's search for zeroes adds 8).
    var neededBytes: UInt64 {
        let pages = gibibytes << 18
        return 2 * (filledBytes + pages * (vmm == .qemu ? 18 : 10)) + 1 << 30
    }
}

/// Which guests, and how often.
struct BigGuestScale: Sendable {
    var cells: [BigGuestCell]
    var runs: Int
    /// QEMU's take a minute each.
    var qemuRuns: Int
    /// How long QEMU may take for one migration.
    var qemuSeconds: UInt64

    func runs(of cell: BigGuestCell) -> Int { cell.vmm == .qemu ? qemuRuns : runs }

    /// The thread's guests, with 5.1 GB that are not zero; and as much of that as fits in 4 GiB, in 4 and in 512 GiB.
    static func full(runs: Int?, hasQEMU: Bool) -> BigGuestScale {
        let published = PublishedMigration.all.map {
            BigGuestCell(
                vmm: .godwit, gibibytes: $0.gibibytes, cpuCount: $0.cpuCount,
                filledBytes: PublishedMigration.filledBytes)
        }
        let compared = [4, 512].map {
            BigGuestCell(vmm: .godwit, gibibytes: $0, cpuCount: 40, filledBytes: 3_600_000_000)
        }
        let others = published.map { cell in
            var cell = cell
            cell.vmm = .qemu
            return cell
        }
        return BigGuestScale(
            cells: published + compared + (hasQEMU ? others : []), runs: runs ?? 5, qemuRuns: min(runs ?? 3, 3),
            qemuSeconds: 300)
    }

    /// The largest alone, with less that is not zero.
    static func quick(runs: Int?) -> BigGuestScale {
        let cells = [4, 512].map {
            BigGuestCell(vmm: .godwit, gibibytes: $0, cpuCount: 40, filledBytes: 1_000_000_000)
        }
        return BigGuestScale(cells: cells, runs: runs ?? 3, qemuRuns: 0, qemuSeconds: 0)
    }
}

/// What was published of such guests in 2013, on the list of QEMU's developers, with the patches that gave each user of dirty pages a
/// bitmap of its own. Another machine, with a processor for each vCPU and a network between its hosts.
struct PublishedMigration: Sendable {
    var gibibytes: UInt64
    var cpuCount: Int
    var setupMilliseconds: Double
    var totalMilliseconds: Double
    var downtimeMilliseconds: Double

    /// Of each guest, bytes that were not zero.
    static let filledBytes: UInt64 = 5_100_000_000

    static let all = [
        PublishedMigration(
            gibibytes: 256, cpuCount: 20, setupMilliseconds: 296, totalMilliseconds: 84_600,
            downtimeMilliseconds: 1893),
        PublishedMigration(
            gibibytes: 512, cpuCount: 40, setupMilliseconds: 1171, totalMilliseconds: 239_500,
            downtimeMilliseconds: 1508),
    ]
}
