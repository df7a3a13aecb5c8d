import Synchronization

/// The read-only hard disk 80h of a guest booted from an image: the image, padded to whole sectors.
///
/// It migrates with its contents, so that a guest which reads sectors after a migration still gets them, whatever
/// image the destination was started with. A guest booted in another way has an empty one, which means no drive.
///
/// Section `godwit/boot-disk`, version 1: length be32 (a multiple of 512, at most 491,520), status of the last INT 13h
/// call u8, the contents.
public final class BootDisk: MigratableDevice {
    /// Bytes in a sector.
    public static let sectorBytes = 512
    /// The longest image: 480 KiB, what fits from 0x7c00 on below 640 KiB.
    public static let maximumBytes = 480 << 10

    public let sectionName = "godwit/boot-disk"
    public let instance: UInt32 = 0
    public let stateVersion: UInt32 = 1

    private struct State {
        var contents: [UInt8]
        var lastStatus: UInt8 = 0
    }

    private let state: Mutex<State>

    /// A drive with the bytes of `image`; none if it is empty.
    ///
    /// - Throws: `BootDiskError` when the image is longer than `maximumBytes`.
    public init(image: [UInt8] = []) throws(BootDiskError) {
        guard image.count <= Self.maximumBytes else { throw .tooLarge(bytes: image.count) }
        let padding = (Self.sectorBytes - image.count % Self.sectorBytes) % Self.sectorBytes
        state = Mutex(State(contents: image + repeatElement(0, count: padding)))
    }

    /// The number of sectors; 0 means that there is no drive.
    public var sectorCount: Int {
        state.withLock { $0.contents.count / Self.sectorBytes }
    }

    /// The bytes of `count` sectors from sector `first`, or nil when the disk does not have them all.
    public func sectors(from first: UInt64, count: Int) -> ArraySlice<UInt8>? {
        state.withLock { state in
            let available = state.contents.count / Self.sectorBytes
            guard let first = Int(exactly: first), first <= available, count >= 0, count <= available - first else {
                return nil
            }
            return state.contents[first * Self.sectorBytes..<(first + count) * Self.sectorBytes]
        }
    }

    /// What the last INT 13h call returned in AH; the next INT 13h AH=01h reports it.
    var lastStatus: UInt8 {
        get { state.withLock { $0.lastStatus } }
        set { state.withLock { $0.lastStatus = newValue } }
    }

    /// Forgets the last call; the contents stay.
    public func reset() {
        lastStatus = 0
    }

    public func saveState() -> [UInt8] {
        let state = state.withLock { $0 }
        var writer = StateWriter()
        writer.write(UInt32(state.contents.count))
        writer.write(state.lastStatus)
        writer.write(bytes: state.contents)
        return writer.bytes
    }

    public func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError) {
        var reader = try StateReader(body, version: version, for: self)
        let length = try reader.readUInt32("length")
        guard length <= Self.maximumBytes, length % UInt32(Self.sectorBytes) == 0 else {
            throw reader.impossible("length", UInt64(length))
        }
        let lastStatus = try reader.readUInt8("last-status")
        let contents = try reader.readBytes("contents", count: Int(length))
        try reader.finish()
        state.withLock { $0 = State(contents: Array(contents), lastStatus: lastStatus) }
    }
}

/// Why an image cannot be a boot disk; its description is one sentence.
public enum BootDiskError: Error, Equatable, CustomStringConvertible {
    /// The image is longer than `BootDisk.maximumBytes`.
    case tooLarge(bytes: Int)

    public var description: String {
        switch self {
        case .tooLarge(let bytes): "boot disk: \(bytes) bytes are more than the limit of \(BootDisk.maximumBytes)"
        }
    }
}
