import CommandLineKit

/// The pages behind both ends' memory.
enum BackingPages: String, Hashable, Sendable, CaseIterable {
    case small = "4 KiB"
    case large = "2 MiB"
    case gigantic = "1 GiB"

    var byteCount: UInt64 {
        switch self {
        case .small: 4 << 10
        case .large: 2 << 20
        case .gigantic: 1 << 30
        }
    }

    /// What `godwit run --memory-backing` is told.
    var option: String {
        switch self {
        case .small: "anonymous"
        case .large: "hugetlb=2M"
        case .gigantic: "hugetlb=1G"
        }
    }
}

/// One way of moving a guest before its memory, measured by what its page requests took.
struct PostcopyCell: Hashable, Sendable {
    var pages = BackingPages.small
    var cpuCount = 1
    /// Of requested pages, besides the main one.
    var channels = 1
    var isEncrypted = false
    /// What nobody asked for may take of the link, in megabytes (10^6 bytes) per second; `nil`: all.
    var capMegabytes: UInt64?
    var memoryMegabytes: UInt64 = 1024

    /// Of pages that the guest touches in a second, in an order that no machine foresees. Its vCPUs sleep between them: what they would do
    /// to the host's processors has nothing to do with pages.
    private static let probedBytesPerSecond = 4000 * 4096

    var guest: String { "probe,write,random,rate=\(Self.probedBytesPerSecond),heartbeat=0" }

    var parameters: [(name: String, value: String)] {
        [
            ("pages", pages.rawValue), ("vcpus", "\(cpuCount) vCPU"), ("channels", "\(channels) channel"),
            ("transport", isEncrypted ? "tls" : "tcp"),
            ("background", capMegabytes.map { "\($0) MB/s" } ?? "full speed"),
        ]
    }

    var name: String { BenchmarkCell(parameters).name }

    /// What both ends and the copy ahead of huge pages take.
    var neededBytes: UInt64 { memoryMegabytes << 20 * (pages == .small ? 2 : 3) + 1 << 30 }
}

/// Which cells, and how often.
struct PostcopyScale: Sendable {
    var cells: [PostcopyCell]
    var runs: Int
    /// Of the idle guest that is moved both ways.
    var idleMegabytes: UInt64

    static func full(runs: Int?) -> PostcopyScale {
        var cells: [PostcopyCell] = []
        for isEncrypted in [false, true] {
            for cpus in [1, 4, 16] {
                cells += [1, 2, 4].map { PostcopyCell(cpuCount: cpus, channels: $0, isEncrypted: isEncrypted) }
            }
        }
        for pages in [BackingPages.large, .gigantic] {
            cells += [1, 4].map { PostcopyCell(pages: pages, cpuCount: $0) }
        }
        cells += [false, true].map {
            PostcopyCell(cpuCount: 4, isEncrypted: $0, capMegabytes: 100, memoryMegabytes: 256)
        }
        return PostcopyScale(cells: cells, runs: runs ?? 5, idleMegabytes: 4096)
    }

    /// The corners.
    static func quick(runs: Int?) -> PostcopyScale {
        let cells = [
            PostcopyCell(), PostcopyCell(cpuCount: 16, channels: 4), PostcopyCell(cpuCount: 4, isEncrypted: true),
            PostcopyCell(pages: .large),
        ]
        return PostcopyScale(cells: cells, runs: runs ?? 3, idleMegabytes: 1024)
    }
}
