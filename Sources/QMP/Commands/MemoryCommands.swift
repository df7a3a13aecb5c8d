import Accelerator
import GuestMemory
import Host
import Machine

/// `pmemsave` and `memsave`: guest memory into a file.
struct MemoryCommands: Sendable {
    private let machine: VirtualMachine

    init(_ machine: VirtualMachine) { self.machine = machine }

    var all: [Command] {
        let range: [Parameter] = [
            .required("val", .integer), .required("size", .integer), .required("filename", .string),
        ]
        return [
            Command("pmemsave", range, handler: savePhysical),
            Command("memsave", range + [.optional("cpu-index", .integer)], handler: saveVirtual),
        ]
    }

    private struct Request {
        let address: UInt64
        let byteCount: UInt64
        let path: String

        init(_ arguments: Arguments) throws {
            address = try arguments.integer("val", in: 0...UInt64(Int64.max))
            byteCount = try arguments.integer("size", in: 0...UInt64(Int64.max) - address)
            path = try arguments.string("filename")
            guard !path.isEmpty else { throw QMPError.parameter("filename", expects: "a path") }
        }
    }

    private func savePhysical(_ call: Command.Call) throws -> JSON {
        let request = try Request(call.arguments)
        let pieces = try MemoryPiece.pieces(
            of: machine.memory, at: GuestPhysicalAddress(request.address), byteCount: request.byteCount)
        try MemoryDump.write(pieces, to: request.path)
        return [:]
    }

    private func saveVirtual(_ call: Command.Call) throws -> JSON {
        let request = try Request(call.arguments)
        let cpus = machine.accelerator?.cpus ?? []
        let index: Int64 = try call.arguments.integer(ifPresent: "cpu-index") ?? 0
        guard let cpu = cpus.first(where: { $0.index == index }) else {
            throw QMPError.parameter("cpu-index", expects: "a CPU number")
        }
        // The page tables stand still only while the guest does.
        let pieces = try machine.whileStopped { try self.pieces(of: request, seenBy: cpu) }
        try MemoryDump.write(pieces, to: request.path)
        return [:]
    }

    private func pieces(of request: Request, seenBy cpu: any VirtualCPU) throws -> [MemoryPiece] {
        var pieces: [MemoryPiece] = []
        var address = request.address
        let end = request.address + request.byteCount
        while address < end {
            let next = min(end, (address / GuestPage.byteCount + 1) * GuestPage.byteCount)
            guard let physical = try cpu.translate(address) else {
                throw QMPError(
                    "memsave: vCPU \(cpu.index) has nothing mapped at 0x\(String(address, radix: 16)); "
                        + "choose a range that the guest maps")
            }
            for piece in try MemoryPiece.pieces(of: machine.memory, at: physical, byteCount: next - address) {
                pieces.append(joining: piece)
            }
            address = next
        }
        return pieces
    }
}

/// Bytes of one RAM block.
struct MemoryPiece {
    let block: RAMBlock
    let range: Range<UInt64>

    /// - Throws: `GuestMemory.AccessError` if a part of the range is not RAM.
    static func pieces(
        of memory: GuestMemory, at address: GuestPhysicalAddress, byteCount: UInt64
    ) throws(GuestMemory.AccessError) -> [MemoryPiece] {
        var pieces: [MemoryPiece] = []
        try memory.forEachPiece(
            at: address, byteCount: byteCount,
            { (block, offset, count) throws(GuestMemory.AccessError) in
                pieces.append(MemoryPiece(block: block, range: UInt64(offset)..<UInt64(offset) + UInt64(count)))
            }, orThrow: { $0 })
        return pieces
    }
}

extension [MemoryPiece] {
    /// Appends, as one with the last where they touch.
    fileprivate mutating func append(joining piece: MemoryPiece) {
        if let last, last.block === piece.block, last.range.upperBound == piece.range.lowerBound {
            self[count - 1] = MemoryPiece(block: last.block, range: last.range.lowerBound..<piece.range.upperBound)
        } else {
            append(piece)
        }
    }
}

/// A file of guest memory: never-touched ranges become holes, all else is written straight from the mapping.
enum MemoryDump {
    /// - Throws: `SystemError` naming the path. What was written so far stays in the file, unless pages that were waited for do not come
    ///   any more: then it is empty.
    static func write(_ pieces: [MemoryPiece], to path: String) throws(SystemError) {
        let file = try Descriptor.create(path)
        var start: UInt64 = 0
        for piece in pieces {
            let end = RAMOffset(piece.range.upperBound + GuestPage.byteCount - 1).page
            for run in try piece.block.allocatedRuns(in: RAMOffset(piece.range.lowerBound).page..<end) {
                let data = (run.lowerBound.offset.value..<run.upperBound.offset.value).clamped(to: piece.range)
                try file.seek(to: start + data.lowerBound - piece.range.lowerBound)
                try write(data, of: piece.block, to: file)
            }
            do throws(SystemError) { try piece.block.checkIsKept() } catch {
                // Zeroes stand in it that nobody ever wrote.
                try? file.truncate(to: 0)
                throw error
            }
            start += UInt64(piece.range.count)
        }
        // A hole at the end.
        if try file.size() < start { try file.truncate(to: start) }
    }

    private static func write(_ data: Range<UInt64>, of block: RAMBlock, to file: Descriptor) throws(SystemError) {
        var vector = IOVector()
        vector.append(block.mapping, offset: Int(data.lowerBound), count: data.count)
        while vector.byteCount > 0 {
            if try file.write(&vector) == nil {
                try file.wait(for: .writable, deadline: .after(seconds: 10), operation: "write")
            }
        }
    }
}
