import Glibc
import Host
public import Testing

/// The host's pool of huge pages of one size, which may grow by some for as long as this lives.
public final class HugePagePool: Sendable {
    public enum Size: String, Sendable, CaseIterable {
        case twoMebibytes = "2M"
        case oneGibibyte = "1G"
        public var byteCount: UInt64 { self == .twoMebibytes ? 2 << 20 : 1 << 30 }
    }

    private let path: String
    private let count: Int

    /// - Returns: `nil`: this process may not change it, or the host has not as many.
    public init?(_ count: Int, of size: Size) {
        let folder = "/sys/kernel/mm/hugepages/hugepages-\(size.byteCount >> 10)kB"
        // Pages of 2 MiB are made when they are touched; those of 1 GiB must be reserved beforehand.
        path = size == .twoMebibytes ? "\(folder)/nr_overcommit_hugepages" : "\(folder)/nr_hugepages"
        guard let number = Self.number(at: path), Self.write(number + count, to: path), let now = Self.number(at: path)
        else { return nil }
        // What came is given back by `deinit`, also if it came short.
        self.count = min(count, max(0, now - number))
        guard self.count == count else { return nil }
    }

    deinit {
        // Others may have changed it meanwhile: only ours go.
        if let now = Self.number(at: path) { _ = Self.write(max(0, now - count), to: path) }
    }

    private static func number(at path: String) -> Int? {
        (try? Descriptor.contents(of: path)).flatMap { Int(String(decoding: $0, as: UTF8.self).filter(\.isNumber)) }
    }

    private static func write(_ number: Int, to path: String) -> Bool {
        guard let file = try? Descriptor.open(path, O_WRONLY) else { return false }
        return (try? file.writeAll(Array("\(number)".utf8))) != nil
    }

    /// Whether so many can be had at all.
    public static func has(_ count: Int, of size: Size) -> Bool { HugePagePool(count, of: size) != nil }
}

/// Said of tests that are skipped.
public let needsHugePages: Comment = "needs huge pages that can be reserved (root, nr_overcommit_hugepages)"
