import GuestMemory
import GuestPrograms
import Host
import KVM

/// Random overlapping changes of the layout, one after the other, while vCPUs spin in all of it; every page and every count is looked at
/// in the end.
struct MemslotsStress {
    let changes: Int
    let cpuCount: Int
    /// The same changes for the same seed.
    let seed: UInt64

    /// Every page holds the same word and the same function: whichever page is seen, only memory that is none gives itself away.
    private static let word: UInt64 = 0x5A5A_0001
    private static let answer: UInt32 = 0x00C0_FFEE
    private static let walkAnswer: UInt64 = 0x77
    private static let walkTarget: UInt64 = 0x9_0000
    private static let mebibyte: UInt64 = 1 << 20
    /// Where regions that can be written come and go.
    private static let writable: Range<UInt64> = 16 * mebibyte..<48 * mebibyte
    /// Where they may become read-only.
    private static let protected: Range<UInt64> = 8 * mebibyte..<12 * mebibyte
    /// Where the page tables lie.
    private static let tables: Range<UInt64> = 12 * mebibyte..<13 * mebibyte

    /// A region, and the part of the address space in which it moves.
    private struct Piece {
        let id: MemoryRegionID
        let area: Range<UInt64>
        let blockBytes: UInt64
        /// What was last made of it: later changes must fit.
        var address: UInt64
        var byteCount: UInt64
        var offset: UInt64
        let mayBeReadOnly: Bool
    }

    func carryOut() throws -> MemslotsRun.Outcome {
        func block(_ name: String, _ mebibytes: UInt64) throws -> RAMBlock {
            try RAMBlock(name: name, byteCount: mebibytes * Self.mebibyte, backing: .memfd)
        }
        let blocks = try [block("ram", 64), block("one", 16), block("two", 16), block("tables", 1)]
        let memory = GuestMemory(blocks: blocks)
        var random = SeededNumbers(seed: seed)
        var pieces = try Self.layOut(blocks, on: memory, &random)
        fill(blocks)
        let guest = makeGuest()
        let machine = try SpinMachine(memory: memory, guest: guest, strategy: .atomic)
        try machine.start()
        let shadow = try ShadowBlocks(of: machine)
        var outcome = MemslotsRun.Outcome()
        for change in 0..<changes {
            var transaction = MemoryTransaction()
            for _ in 0...random.below(3) {
                alter(&pieces[Int(random.below(UInt64(pieces.count)))], in: &transaction, &random)
            }
            let start = Clock.monotonicNanoseconds
            do throws(MemoryError) { try memory.commit(transaction) } catch {
                throw MemoryError("change \(change) of seed \(seed): \(error)")
            }
            outcome.commitMilliseconds.append(Double(Clock.monotonicNanoseconds - start) / 1e6)
            if change % 97 == 0 { try shadow.round() }
        }
        try outcome.account(for: machine, shadow) { cpu in
            blocks.dropLast().reduce(0) { $0 + Self.counted(by: cpu, in: $1) }
        }
        outcome.lostPages += Self.damaged(blocks)
        return outcome
    }

    // MARK: Layout

    private static func layOut(
        _ blocks: [RAMBlock], on memory: GuestMemory, _ random: inout SeededNumbers
    ) throws -> [Piece] {
        var layout = MemoryTransaction()
        layout.add(.ram("ram", blocks[0]), at: 0)
        let all = blocks.map { layout.create(.ram("all of \($0.name)", $0)) }
        layout.add(.alias("tables", of: all[3], byteCount: mebibyte), at: tables.lowerBound, priority: 1)
        var pieces: [Piece] = []
        for number in 0..<16 {
            let area = number < 10 ? writable : number < 14 ? protected : tables
            let block = number < 14 ? 1 + number % 2 : 3
            let piece = Piece(
                id: layout.add(
                    .alias("piece-\(number)", of: all[block], byteCount: 4096), at: area.lowerBound,
                    priority: 2 + Int(random.below(4))),
                area: area, blockBytes: blocks[block].byteCount, address: area.lowerBound, byteCount: 4096, offset: 0,
                mayBeReadOnly: area == protected)
            pieces.append(piece)
        }
        try memory.commit(layout)
        return pieces
    }

    private func alter(_ piece: inout Piece, in transaction: inout MemoryTransaction, _ random: inout SeededNumbers) {
        let page: UInt64 = 4096
        let room = UInt64(piece.area.count) / page
        switch random.below(8) {
        case 0, 1:
            let most = room - (piece.byteCount / page)
            piece.address = piece.area.lowerBound + random.below(most + 1) * page
            transaction.move(piece.id, to: piece.address)
        case 2, 3:
            let most = min((piece.area.upperBound - piece.address) / page, (piece.blockBytes - piece.offset) / page)
            piece.byteCount = (1 + random.below(min(most, 1 << random.below(13)))) * page
            transaction.resize(piece.id, to: piece.byteCount)
        case 4:
            piece.offset = random.below((piece.blockBytes - piece.byteCount) / page + 1) * page
            transaction.setAlias(piece.id, offset: piece.offset)
        case 5: transaction.enable(piece.id, random.below(3) > 0)
        case 6: transaction.setPriority(piece.id, 2 + Int(random.below(4)))
        default:
            if piece.mayBeReadOnly {
                transaction.setReadOnly(piece.id, random.below(2) == 0)
            } else {
                transaction.enable(piece.id)
            }
        }
    }

    // MARK: Contents

    private func fill(_ blocks: [RAMBlock]) {
        let function = SpinGuest.function(returning: Self.answer)
        for (number, block) in blocks.dropLast().enumerated() {
            for page in stride(from: number == 0 ? Self.protected.lowerBound : 0, to: block.byteCount, by: 4096) {
                block.mapping.store(Self.word, at: Int(page))
                block.mapping.write(function, at: Int(page) + 0x800)
            }
        }
        blocks[0].mapping.store(Self.walkAnswer, at: Int(Self.walkTarget))
        let table = SpinGuest.walkTable(mapping: Self.walkTarget)
        for page in stride(from: 0, to: Int(blocks[3].byteCount), by: 4096) { blocks[3].mapping.write(table, at: page) }
    }

    private func makeGuest() -> SpinGuest {
        var guest = SpinGuest(cpuCount: cpuCount, outside: Set((0..<cpuCount).filter { $0 % 4 == 3 }))
        for (area, isWritten) in [(Self.writable, true), (Self.protected, false)] {
            for number in 0..<32 {
                let step = UInt64(area.count) / 32
                let address = area.lowerBound + UInt64(number) * step + UInt64(number % 5) * 4096
                guest.reads.append(.init(address, answers: [Self.word]))
                guest.calls.append(.init(address + 0x800, answers: [UInt64(Self.answer)]))
                if isWritten { guest.writes.append(address) }
            }
        }
        for table in 0..<8 {
            guest.walkTables.append(Self.tables.lowerBound + UInt64(table) * 0x1_7000)
            for entry in stride(from: 0, to: 512, by: 16) {
                guest.walks.append(
                    .init(SpinGuest.walkAddress(table: table, entry: entry), answers: [Self.walkAnswer]))
            }
        }
        return guest
    }

    private static func counted(by cpu: Int, in block: RAMBlock) -> UInt64 {
        let first = block.name == "ram" ? protected.lowerBound : 0
        return stride(from: first, to: block.byteCount, by: 4096).reduce(0) {
            $0 + block.mapping.load(at: Int($1) + SpinGuest.counterOffset(cpu: cpu), as: UInt64.self)
        }
    }

    /// Pages in which anything but the counters is not what was written in the beginning.
    private static func damaged(_ blocks: [RAMBlock]) -> UInt64 {
        var expected = [UInt8](repeating: 0, count: 4096)
        for byte in 0..<8 { expected[byte] = UInt8(truncatingIfNeeded: word >> UInt64(byte * 8)) }
        let function = SpinGuest.function(returning: answer)
        expected.replaceSubrange(0x800..<0x800 + function.count, with: function)
        let counters = SpinGuest.counterOffset(cpu: 0)..<SpinGuest.counterOffset(cpu: SpinGuest.maximumCPUs)
        var count: UInt64 = 0
        for block in blocks.dropLast() {
            for page in stride(from: block.name == "ram" ? protected.lowerBound : 0, to: block.byteCount, by: 4096) {
                var bytes = block.read(at: Int(page), count: 4096)
                bytes.replaceSubrange(counters, with: expected[counters])
                if bytes != expected { count += 1 }
            }
        }
        let table = SpinGuest.walkTable(mapping: walkTarget)
        let last = blocks[blocks.count - 1]
        for page in stride(from: 0, to: Int(last.byteCount), by: 4096) where last.read(at: page, count: 4096) != table {
            count += 1
        }
        return count
    }
}

/// SplitMix64: the same numbers for the same seed.
struct SeededNumbers: RandomNumberGenerator {
    private var state: UInt64

    init(seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var word = state
        word = (word ^ (word >> 30)) &* 0xbf58_476d_1ce4_e5b9
        word = (word ^ (word >> 27)) &* 0x94d0_49bb_1331_11eb
        return word ^ (word >> 31)
    }

    mutating func below(_ limit: UInt64) -> UInt64 { next() % limit }
}
