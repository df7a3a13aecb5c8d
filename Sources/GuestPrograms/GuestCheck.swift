/// What a check of a guest's memory found. Printing it gives the result in a few lines.
public struct GuestCheck: Equatable, Sendable, CustomStringConvertible {
    /// What can be wrong with a page.
    public enum Fault: String, CaseIterable, Sendable {
        /// The page does not name itself: it was lost, zeroed, or it is another page's content.
        case mismatchedTag = "wrong tag"
        /// The page names itself, but its noise, its zeroes, or the guest's code or page tables are not what they must be.
        case damagedContent = "damaged content"
        /// The page lacks a write that the guest's status says was made.
        case stale = "stale"
        /// The page holds a write that the guest's status says was not made yet.
        case premature = "ahead of the status"
    }

    /// One page at fault.
    public struct Example: Equatable, Sendable, CustomStringConvertible {
        public let fault: Fault
        public let physicalAddress: UInt64
        /// The first word that is wrong, or the stamp of a page which is stale or premature.
        public let found: UInt64
        public let expected: UInt64

        public var description: String {
            func hexadecimal(_ word: UInt64) -> String { "0x" + String(word, radix: 16) }
            return "page at \(hexadecimal(physicalAddress)) is \(fault.rawValue): found \(hexadecimal(found)), "
                + "expected \(hexadecimal(expected))"
        }
    }

    /// How many examples of each fault are kept.
    public static let examplesPerFault = 4

    /// What the guest says of itself.
    public let status: GuestStatus
    /// Pages whose content is known and was compared.
    public internal(set) var pagesChecked: UInt64 = 0
    /// Pages of the guest's range which it has not written yet, or was writing: nothing is known of them.
    public internal(set) var pagesUnwritten: UInt64 = 0
    public internal(set) var mismatchedTags: UInt64 = 0
    public internal(set) var damagedPages: UInt64 = 0
    public internal(set) var stalePages: UInt64 = 0
    public internal(set) var prematurePages: UInt64 = 0
    /// The first pages of each fault.
    public internal(set) var examples: [Example] = []

    init(status: GuestStatus) {
        self.status = status
    }

    public var faultyPages: UInt64 { mismatchedTags + damagedPages + stalePages + prematurePages }

    /// Whether pages were compared, all of them are right, and no vCPU has stopped by an exception.
    public var isVerified: Bool {
        faultyPages == 0 && pagesChecked > 0 && !status.cpus.contains { $0.phase == .faulted }
    }

    mutating func record(_ example: Example) {
        switch example.fault {
        case .mismatchedTag: mismatchedTags += 1
        case .damagedContent: damagedPages += 1
        case .stale: stalePages += 1
        case .premature: prematurePages += 1
        }
        if examples.lazy.filter({ $0.fault == example.fault }).count < Self.examplesPerFault {
            examples.append(example)
        }
    }

    public var description: String {
        let cpus = "\(status.cpusActive) of \(status.cpusExpected) vCPUs"
        let work = "\(cpus), \(status.passes) passes, \(status.touches) touches"
        if isVerified {
            let unwritten = pagesUnwritten == 0 ? "" : ", \(pagesUnwritten) not written yet"
            return "verified: \(pagesChecked) pages are what guest \(status.kind.name) wrote\(unwritten) (\(work))"
        }
        var lines = [
            "NOT verified: \(faultyPages) of \(pagesChecked) pages of guest \(status.kind.name) are wrong (\(work))"
        ]
        for (count, what) in [
            (mismatchedTags, Fault.mismatchedTag), (damagedPages, .damagedContent), (stalePages, .stale),
            (prematurePages, .premature),
        ] where count > 0 {
            lines.append("  \(what.rawValue): \(count)")
        }
        lines += examples.map { "  \($0)" }
        for (index, cpu) in status.cpus.enumerated() where cpu.phase == .faulted {
            lines.append("  vCPU \(index) was stopped by an exception")
        }
        return lines.joined(separator: "\n")
    }
}
