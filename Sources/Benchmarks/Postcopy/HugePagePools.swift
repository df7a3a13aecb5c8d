import CommandLineKit
import Glibc
import Host

/// Huge pages that are borrowed from the host for a while: its pools are grown for the cells that need them, and get their size back.
final class HugePagePools {
    /// What stood in files that were changed.
    private var before: [(path: String, text: [UInt8])] = []
    private var tried: [BackingPages: String?] = [:]

    /// Pages that both ends of the largest cell take.
    static func count(_ cell: PostcopyCell) -> UInt64 {
        2 * (((cell.memoryMegabytes << 20) + cell.pages.byteCount - 1) / cell.pages.byteCount)
    }

    /// Gets what the cell needs. - Returns: why that cannot be; `nil`: it is there.
    func obstacle(to cell: PostcopyCell) -> String? {
        let available = HostMemory.availableByteCount
        guard cell.neededBytes <= available else {
            return "it takes \(Amount.memory(cell.neededBytes)) of this host, and \(Amount.memory(available)) are free"
        }
        guard cell.pages != .small else { return nil }
        if let known = tried[cell.pages] { return known }
        let obstacle = grow(cell)
        tried[cell.pages] = .some(obstacle)
        return obstacle
    }

    private func grow(_ cell: PostcopyCell) -> String? {
        let folder = "/sys/kernel/mm/hugepages/hugepages-\(cell.pages.byteCount >> 10)kB"
        // Pages of 1 GiB must be found beforehand; others are looked for when they are needed.
        let path = "\(folder)/\(cell.pages == .gigantic ? "nr_hugepages" : "nr_overcommit_hugepages")"
        let wanted = Self.count(cell)
        guard let text = try? Descriptor.contents(of: path, limit: 64), let now = Self.number(text) else {
            return "this host has no pages of \(cell.pages.rawValue)"
        }
        let free = (try? Descriptor.contents(of: "\(folder)/free_hugepages", limit: 64)).flatMap(Self.number) ?? 0
        if free >= wanted { return nil }
        do {
            try Descriptor.open(path, O_WRONLY).writeAll(Array("\(now + wanted - free)\n".utf8))
        } catch { return "\(wanted) pages of \(cell.pages.rawValue) cannot be reserved (\(error))" }
        before.append((path, text))
        let after = (try? Descriptor.contents(of: path, limit: 64)).flatMap(Self.number) ?? 0
        guard after >= now + wanted - free else {
            return "of \(wanted) pages of \(cell.pages.rawValue) the host finds \(free + after - now)"
        }
        return nil
    }

    private static func number(_ text: [UInt8]) -> UInt64? {
        UInt64(String(decoding: text.prefix { $0 != 0x0A }, as: UTF8.self))
    }

    /// The pools have their size again.
    func giveBack() {
        for (path, text) in before.reversed() { try? Descriptor.open(path, O_WRONLY).writeAll(text) }
        before = []
    }
}
