import GuestMemory
import Host
import MigrationStream

/// The thread that hears of accesses to missing pages, and has the source asked for them.
///
/// It touches guest memory through the userfaultfd alone, and takes no lock that anybody holds who does: it would wait for itself.
final class FaultServer: Sendable {
    private let faults: UserFault
    private let memory: GuestMemory
    private let pending: PendingPages
    private let stop: EventDescriptor
    private let request: @Sendable ([PageRequest]) -> Void
    /// Where blocks lie in this process, in order of addresses.
    private let places: [(addresses: Range<UInt>, block: Int)]

    /// More than threads of a guest that fault at once.
    private static let batchCapacity = 64

    init(
        _ faults: UserFault, _ memory: GuestMemory, _ pending: PendingPages,
        request: @escaping @Sendable ([PageRequest]) -> Void
    ) throws(SystemError) {
        self.faults = faults
        self.memory = memory
        self.pending = pending
        self.request = request
        stop = try EventDescriptor()
        places = memory.blocks.indices.map { index in
            let start = memory.blocks[index].mapping.hostAddress(at: 0)
            return (start..<start + UInt(memory.blocks[index].byteCount), index)
        }
    }

    /// Ends once `end` was called and no fault waits. - Throws: `SystemError`.
    func run() throws(SystemError) {
        var batch = PageFaultBatch(capacity: Self.batchCapacity)
        var requests: [PageRequest] = []
        while try faults.waitForFaults(into: &batch, stop: stop) {
            requests.removeAll(keepingCapacity: true)
            for index in 0..<batch.count { try take(batch[index], &requests) }
            if !requests.isEmpty { request(requests) }
        }
    }

    func end() { stop.raise() }

    private func take(_ fault: PageFault, _ requests: inout [PageRequest]) throws(SystemError) {
        // Only blocks are watched.
        guard let place = places.first(where: { $0.addresses.contains(fault.address) }) else { return }
        let page = RAMOffset(UInt64(fault.address - place.addresses.lowerBound)).page
        let bytes = Int(page.offset.value)..<Int(page.offset.value) + Int(GuestPage.byteCount)
        let block = memory.blocks[place.block]
        switch pending.answer(page, of: place.block, thread: fault.threadID) {
        case .hole: try faults.zero(block.mapping, bytes)
        case .here: try faults.wake(block.mapping, bytes)
        case .coming: break
        case .request:
            requests.append(
                PageRequest(block: block.name, offset: page.offset.value, length: UInt32(GuestPage.byteCount)))
        }
    }
}
