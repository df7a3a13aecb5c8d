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
    private let before: String

    /// - Returns: `nil`: this process may not change it, or the host has not as many.
    public init?(_ count: Int, of size: Size) {
        let folder = "/sys/kernel/mm/hugepages/hugepages-\(size.byteCount >> 10)kB"
        // Pages of 2 MiB are made when they are touched; those of 1 GiB must be reserved beforehand.
        path = size == .twoMebibytes ? "\(folder)/nr_overcommit_hugepages" : "\(folder)/nr_hugepages"
        guard let text = Self.number(at: path), let number = Int(text) else { return nil }
        before = text
        guard Self.write("\(number + count)", to: path), let now = Self.number(at: path).flatMap({ Int($0) }) else {
            return nil
        }
        // What came short is given back by `deinit`.
        guard now >= number + count else { return nil }
    }

    deinit { _ = Self.write(before, to: path) }

    private static func number(at path: String) -> String? {
        (try? Descriptor.contents(of: path)).map { String(decoding: $0, as: UTF8.self).filter(\.isNumber) }
    }

    private static func write(_ text: String, to path: String) -> Bool {
        guard let file = try? Descriptor.open(path, 1) else { return false }
        return (try? file.writeAll(Array(text.utf8))) != nil
    }

    /// Whether so many can be had at all.
    public static func has(_ count: Int, of size: Size) -> Bool { HugePagePool(count, of: size) != nil }
}

/// Said of tests that are skipped.
public let needsHugePages: Comment = "needs huge pages that can be reserved (root, nr_overcommit_hugepages)"
