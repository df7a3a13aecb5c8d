import CLinux
import Glibc

/// An access that waits for its page.
public struct PageFault: Hashable, Sendable {
    /// In this process: of the page, or with ``UserFault/Features/exactAddress`` of the byte.
    public let address: UInt
    public let isWrite: Bool
    /// The file has the page (``UserFault/Mode/minor``).
    public let isMinor: Bool
    /// The page is there, and protected (``UserFault/Mode/writeProtected``).
    public let isProtected: Bool
    /// The kernel's id of the thread that waits, with ``UserFault/Features/threadID``; else 0. KVM may have a thread of the kernel
    /// fetch a page while the vCPU is halted: then it is that one's.
    public let threadID: Int32
}

/// Page faults as they were read: filled again and again, so that reading allocates nothing.
public struct PageFaultBatch: Sendable {
    private var storage: [UInt8]
    public private(set) var count = 0
    /// So many fit.
    public let capacity: Int

    public init(capacity: Int = 64) {
        precondition(capacity > 0, "a batch has room")
        self.capacity = capacity
        storage = [UInt8](repeating: 0, count: capacity * Self.messageBytes)
    }

    private static let messageBytes = GW_UFFD_MESSAGE_BYTES

    /// - Precondition: `index` is below `count`.
    public subscript(index: Int) -> PageFault {
        precondition(index >= 0 && index < count, "inside the batch")
        let start = index * Self.messageBytes
        let flags = load(start + GW_UFFD_MESSAGE_FLAGS, as: UInt64.self)
        return PageFault(
            address: UInt(load(start + GW_UFFD_MESSAGE_ADDRESS, as: UInt64.self)),
            isWrite: flags & UInt64(UFFD_PAGEFAULT_FLAG_WRITE) != 0,
            isMinor: flags & UInt64(UFFD_PAGEFAULT_FLAG_MINOR) != 0,
            isProtected: flags & UInt64(UFFD_PAGEFAULT_FLAG_WP) != 0,
            threadID: Int32(bitPattern: load(start + GW_UFFD_MESSAGE_THREAD, as: UInt32.self)))
    }

    private func load<Value: FixedWidthInteger & BitwiseCopyable>(_ offset: Int, as type: Value.Type) -> Value {
        // SAFETY: every bit pattern is a valid integer, and the span checks the bounds.
        unsafe storage.span.bytes.unsafeLoadUnaligned(fromByteOffset: offset, as: type)
    }

    mutating func fill(from descriptor: Descriptor) throws(SystemError) {
        count = 0
        var result: Result<Int?, SystemError> = .success(nil)
        unsafe storage.withUnsafeMutableBytes { buffer in
            do throws(SystemError) { result = .success(unsafe try descriptor.read(into: buffer)) } catch {
                result = .failure(error)
            }
        }
        let messages = (try result.get() ?? 0) / Self.messageBytes
        for index in 0..<messages where storage[index * Self.messageBytes] != UInt8(UFFD_EVENT_PAGEFAULT) {
            // No other was asked for when the descriptor was made.
            throw SystemError("read", descriptor.name, code: EPROTO)
        }
        count = messages
    }
}

extension UserFault {
    /// Reads the faults that wait, each once: whoever has read one must end it. Never blocks; the batch is empty if there are none.
    public func read(into batch: inout PageFaultBatch) throws(SystemError) { try batch.fill(from: descriptor) }

    /// Reads the faults that wait, or waits for the first.
    /// - Returns: false, with an empty batch, once `stop` is raised and no fault waits.
    public func waitForFaults(into batch: inout PageFaultBatch, stop: EventDescriptor) throws(SystemError) -> Bool {
        while true {
            try read(into: &batch)
            if batch.count > 0 { return true }
            let ready = try poll([(descriptor, .readable), (stop.descriptor, .readable)])
            if ready[0].contains(.readable) { continue }
            if ready[1].contains(.readable) { return false }
            if !ready[0].isEmpty { throw SystemError("poll", descriptor.name, code: EIO) }
        }
    }
}
